"""A campaign of two arms, with the records of its runs."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from test_report import run

from effbench.report.campaign import Campaign
from effbench.report.campaign_file import campaign_in
from effbench.results.records import write


def two_arms(folder: Path, text: str) -> Campaign:
    """Return the campaign `ab` in a folder of results, which gets its runs' records.

    Args:
        folder: New or empty.
        text: The campaign's file; the loss of its second arm is 0.3 higher.
    """
    runs = [run("lora", {"": 0.0}), run("full", {"": 0.3}, number=1)]
    for record in runs:
        write(record, folder / "records")
    (folder / "campaigns").mkdir()
    arms = zip(yaml.safe_load(text)["arms"], runs, strict=True)
    keys = {name: [record.key] for name, record in arms}
    (folder / "campaigns" / "ab.json").write_text(json.dumps(keys))
    (folder / "ab.yaml").write_text(text)
    return campaign_in(folder / "ab.yaml")
