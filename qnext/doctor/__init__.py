"""What limits a machine for mixture-of-experts models, and what each fault costs in tokens per second.

Pure: machine, engine facts and a model's header come in as values, findings come out.
"""
