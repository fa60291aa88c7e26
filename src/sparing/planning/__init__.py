"""`sparing plan`: where a run could happen, what it would cost and reach there, alternatives side by side, the inverse questions.

torch is imported only to measure this machine.
"""
