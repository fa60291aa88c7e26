"""Beginning and finishing whatever learns: `begin` enters lock, meter and signals, resolves and calibrates; `learn` trains; `finish` writes
completions, model card and summary. Every stage can be killed and done again.
"""
