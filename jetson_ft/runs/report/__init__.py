"""The reports of a finished run: `summary` writes them, `chart` draws the loss curves.

`report.json` is for programs, `report.md` and `report.html` for people. Start with
`summary.write_report`.
"""
