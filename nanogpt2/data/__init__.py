"""Files -> token ids and examples -> batches. Read in this order. No file here knows the model.

files.py     a source -> files -> their bytes, unpacked -> their text, decoded
records.py   .jsonl, .csv, .tsv and .parquet -> records
chat.py      a conversation's record -> segments of text, each trained on or only read
tasks.py     a record's columns -> the task that would read them
encode.py    texts and records -> token ids, in pieces
shards.py    token ids <-> a memory-mapped file with a checksum
streams.py   a source and a task -> a stream of ids, kept in a cache
labelled.py  a source -> texts and their labels, to classify
examples.py  one example of a chat or a classification -> its inputs and targets
corpus.py    a stream -> a training split and a validation split
loader.py    -> batches, each a function of the seed and its position
preview.py   a batch of examples -> text, with the trained parts marked
"""
