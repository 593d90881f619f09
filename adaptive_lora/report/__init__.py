"""Reports: run directories in, tables and figures out. They read files only and know nothing of
torch."""

from adaptive_lora.report.read import RunRecord, read_run
from adaptive_lora.report.write import report

__all__ = ["RunRecord", "read_run", "report"]
