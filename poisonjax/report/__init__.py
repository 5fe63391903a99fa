"""A run folder as one page with figures; reads the folder's files alone, so it works anywhere."""

from poisonjax.report.page import write_report

__all__ = ["write_report"]
