"""Makes training text better before it is read: rules that judge documents, and what else a corpus goes through.

`words` splits text once for all rules, `document` holds what they share, `rules` applies them to Arrow batches.
"""
