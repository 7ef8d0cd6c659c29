"""`python -m dpcomm plan`: what an all-reduce should take on hosts and links of your choice. docs/plan.md.

question.py     what is asked, checked
counts.py       messages, slices and bytes, as the engines count them
cpu.py, gpu.py  formulas; constants.py has what was fitted to measurements, machine.py what GPUs and links are taken for
predict.py      rows, break-even, verdict
command.py      the command; picture.py its plot
"""
