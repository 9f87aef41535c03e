"""A model for other programs: written, read again, and run by the other program where it can be.

options.py is the command line; targets.py says what each target can hold. run.py writes aside,
checks and renames. hf_folder.py, gguf_file.py, onnx_file.py, nanogpt_file.py and llmc_file.py each
write one format and check it; prompts.py has the ten prompts and counterpart.py runs the other
program. with_transformers.py, with_llama_cpp.py and with_onnxruntime.py are what it runs.
"""
