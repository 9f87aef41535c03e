"""Files -> token ids and examples -> batches; read from the bottom up. Nothing knows the model.

files.py     a source -> files -> their bytes, unpacked -> their text, decoded
records.py   .jsonl, .csv, .tsv and .parquet -> records
chat.py      a record -> what is said, and which of it is trained on
encode.py    texts and records -> token ids, in pieces
shards.py    token ids <-> a file that is mapped into memory and whose damage is found
streams.py   a source and a task -> a stream of ids, kept in a cache
examples.py  one example of a chat or a classification -> its inputs and targets
corpus.py    a stream -> what is trained on, what is held out
loader.py    -> batches, each a function of the seed and its place
preview.py   a batch of examples -> what is trained on, as text
"""
