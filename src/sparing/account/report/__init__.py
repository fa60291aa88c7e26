"""report.html: one page about a run, or several side by side, that needs no network and nothing beside it.

story.py reads a run into what the page shows, charts.py makes plotly's figures of it, parts.py HTML of tables and samples, page.py the
page. plotly.js is embedded once per page, from the `plotly` package (extra `report`); the only other script is the few lines that draw.
"""
