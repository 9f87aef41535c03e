"""Files -> token ids and examples -> batches. Read in this order. No file here knows the model.

files.py        a source -> files -> their bytes, unpacked -> their text, decoded
columnar.py     .parquet and .arrow -> rows
records.py      files of records -> records
chat.py         a conversation's record -> segments of text, each trained on or only read
tasks.py        a record's columns -> the task that would read them
encode.py       texts and records -> token ids, in pieces
worker.py       a process that encodes texts
parallel.py     a long text -> batches -> ids, by several processes
shards.py       token ids <-> a memory-mapped file with a checksum
unfinished.py   the ids of a long source while they are made, so that a killed run goes on
tokenise.py     long texts -> ids: in blocks, in parallel, resumable
token_files.py  other programs' files of ids, as they are
content.py      the files of a source -> ids or entries; bad records, skipped files
streams.py      a source and a task -> a stream of ids, kept in a cache
labelled.py     a source -> texts and their labels, to classify
examples.py     one example of a chat or a classification -> its inputs and targets
corpus.py       a stream -> a training split and a validation split
mix.py          several corpora -> one, by weight
shuffle.py      the order of the sequences
loader.py       -> batches, each a function of the seed and its position
preview.py      a batch of examples -> text, with the trained parts marked
"""
