"""What effbench asks of every method, asked of NEFTune."""

from effbench.testing.contract import MethodContract


class TestNeftune(MethodContract):
    methods = ("neftune",)
