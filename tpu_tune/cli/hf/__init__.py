"""`tpu-tune hf`: the flags of Hugging Face training scripts, translated to a configuration and run.

A command line, or a bash script that `bash_script` reads, becomes flags and values (`command_line`). `translate` turns
these into a configuration by the table in `flags`; `data_flags` holds what concerns the training data. `listing` prints
the outcome, and `command` is the command itself: it checks the memory, then trains or evaluates.
"""
