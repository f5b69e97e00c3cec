"""Tests for packages with a method of their own; they need pytest, and no command imports them."""

import pytest

pytest.register_assert_rewrite("effbench.testing.contract")
