"""Ways to change a model that is there: each file is a (start, feed, objective) for the one trainer.

`sft` teaches a run to answer, by conversations; `esft` limits what learns of it to the experts that these use.
"""
