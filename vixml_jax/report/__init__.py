"""Results for people: tables, charts, the HTML report, comparisons of runs."""
