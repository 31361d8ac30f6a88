"""Analysis of finished runs: data frames, statistics, tables, figures, and the report."""
