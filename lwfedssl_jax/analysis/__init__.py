"""Finished runs read back: data frames, statistics, tables, figures, and the report."""
