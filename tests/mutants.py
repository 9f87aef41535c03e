"""Mistakes to put into the shipped source, one at a time, each with the test that must fail.

A mutant takes three lines under the test that kills it:

    test_file.py::test_name
    the rule: how the mutant breaks it
    - a snippet of the source
    + the mistake in its place

The snippet must stand exactly once in nanogpt2/, kernels/, train.py and sample.py. No file is
named, so moving a function breaks nothing; white space does not matter, so neither does formatting.
An empty `+` deletes the snippet; several `+` lines become statements on one line.

The table holds three sorts of mutant, and no others. Some survived once, and a test was written for
them (the first n-gram, end tokens that crowd the candidates, eval mode, the best loss over a stop,
an id beyond the vocabulary, float16's scale). Some break a rule that looks like a detail and is
transformers' to the bit (ties, fillers, draws of rows that ended). Some lose data or hide damage
(the order of a commit, digests). A mistake that many tests see needs no line here. A patch that
changes no result is no mutant.

test_mutants.py checks in every run that each mutant still applies, and kills all of them with
`pytest -m marathon tests/test_mutants.py`; choose some with `-k WORD`.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHIPPED = ("nanogpt2", "kernels", "train.py", "sample.py")
NEEDED = ("tests", "benchmarks", "pyproject.toml")

TABLE = """
test_pickled.py::test_what_is_no_plain_tensor_is_named
torch.save: a tensor negated only on reading is read without its sign
- tensor.layout != torch.strided or tensor.is_neg() or tensor.is_conj()
+ tensor.layout != torch.strided or tensor.is_conj()
torch.save: one number stands for a matrix of any size
- if len(shape) > MOST_AXES or count > span:
+ if len(shape) > MOST_AXES:
test_pickled.py::test_tensors_stored_in_other_ways
torch.save: bytes that two tensors share are digested twice
- fresh = data[place - entry.start :].numpy().data
+ fresh = data.numpy().data
test_parity.py::test_random_configurations
beam sampling: the drawn candidates are not sorted
- places = drawn.gather(1, order)
+ places = drawn
prefix_allowed_tokens_fn: sampled rows are numbered by themselves
- fn=request.prefix_allowed_tokens, rows=rows
+ fn=request.prefix_allowed_tokens, rows=rows if c.num_beams > 1 else 1

test_parity.py::test_end_tokens_crowd_the_top
candidates: two a beam, however many tokens end a text
- max(2, 1 + len(request.eos))
+ 2

test_parity.py::test_an_end_outside_the_first_candidates_is_dropped
finished beams: any candidate may finish, not the first K alone
- now[:, K:] = False
+

test_parity.py::test_early_stopping
early_stopping: a search that was hopeless gains hope again
- beams.improvable = beams.improvable & (best_possible
+ beams.improvable = (best_possible
early_stopping: a hopeless prompt still finishes texts
- for barred in (full, ~beams.improvable, ~now)
+ for barred in (full, ~now)

test_parity.py::test_fillers
filler of beams: a pad of 0 stays
- request.pad or int(request.eos[0])
+ int(request.eos[0]) if request.pad is None else request.pad
filler of samples: a pad of 0 becomes the end token
- if request.pad is not None: return request.pad
+ if request.pad: return request.pad

test_parity.py::test_rows_that_ended_go_on_drawing
sampling: rows that ended do not draw
- tokens, scores = choose(ids, engine.next_scores(ids), step)
+ scores = engine.next_scores(ids)
+ drawn, kept = choose(ids[running], scores[running], step)
+ tokens = filler.repeat(len(ids))
+ tokens[running], scores[running] = drawn, kept

test_parity.py::test_the_penalty_of_padded_prompts
repetition_penalty: padding counts as a token
- ids = ids.where(seen, ids[:, -1:])
+

test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart
positions: padding counts
- (keys.cumsum(1) - 1).clamp(min=0)
+ (torch.ones_like(keys).cumsum(1) - 1)

test_generation.py::test_the_largest_are_those_of_topk
equal scores: the candidates are not topk's
- if (values[:, 1:] < values[:, :-1]).all()
+ if True

test_generation.py::test_padding_is_inferred_as_transformers_does
padding: a pad that ends texts marks padding
- if pad is not None and pad not in eos
+ if pad is not None

test_generation.py::test_eval_mode_is_forced_and_restored
eval mode: dropout stays on while generating
- if training: model.eval()
+

test_generation.py::test_context_start_leaves_room
context: slides at every token
- length - block_size + min(max_length - length, block_size // 2)
+ length - block_size

test_processors.py::test_the_order_is_transformers
order: the user's processors before all others
- chain += [("logits_processor", processor) for
+ chain[:0] = [("logits_processor", processor) for

test_processors.py::test_no_ngram_is_banned_before_there_is_one
n-gram ban: begins one token late
- if ids.size(1) < n:
+ if ids.size(1) <= n:

test_processors.py::test_where_a_text_begins
begin_suppress_tokens: a forced first token is the beginning
- begin = T + 1 if T == 1 and c.forced_bos_token_id is not None else T
+ begin = T

test_processors.py::test_bad_words
bad words: an end token is banned
- for word in words if word not in ends
+ for word in words

test_processors.py::test_min_new_tokens_counts_from_the_prompts_end
min_length: wins over min_new_tokens
- if c.min_new_tokens is not None:
+ if c.min_new_tokens is not None and c.min_length == 0:

test_processors.py::test_top_p_at_a_tie_of_masses
top_p: one token too many where the mass is exact
- cumsum(dim=1) <= 1 - p
+ cumsum(dim=1) < 1 - p

test_processors.py::test_top_p_sorts_where_two_are_alike
top_p without a sort: two equal tokens are told apart
- if (best.values.gather(1, last) == best.values.gather(1, last - 1)).any()
+ if False

test_processors.py::test_top_p_without_sorting_all
top_p without a sort: the tokens outside hold no mass
- rest + masses.flip(1)
+ masses.flip(1)

test_processors.py::test_beams_keep_a_token_beside_the_ends
top_p: beams may keep one token alone
- banned[:, -keep:] = False
+ banned[:, -1:] = False

test_processors.py::test_typical_p
typical_p: the token that reaches the mass is dropped
- distance > distance.gather(1, last)
+ distance >= distance.gather(1, last)

test_processors.py::test_top_h_looks_at_100_tokens
top_h: the entropy of 50 tokens
- scores.topk(min(100, scores.size(1)), dim=1)
+ scores.topk(min(50, scores.size(1)), dim=1)

test_stopping.py
stop strings: only at the end of a token
- max(0, len(text) - last - len(each) + 1)
+ len(text) - len(each)
stop strings: looked for in too few tokens
- -self._longest - 1 :
+ -self._longest + 1 :

test_noise.py::test_the_batch_does_not_matter
counter: a sample's noise depends on its row in the batch
- samples.repeat(len(request.ids))
+ torch.arange(len(request.ids) * len(samples)) + config.first_sample

test_noise.py::test_beams_in_any_batch
counter: the step of beams counts the prompt
- step = running.ids.size(2) - request.prompt_length
+ step = running.ids.size(2)

test_noise.py::test_the_few_are_picked_out
few possible tokens: a row with too few draws an impossible one
- or int(counts.min()) < count
+

test_noise.py::test_torchs_stream_is_drawn_from_as_torch_draws
few possible tokens: another random stream than torch's
- torch.rand(shape, dtype=torch.float64, generator
+ torch.rand(shape, dtype=torch.float32, generator

test_kernels_in_use.py::test_generate
kernels: the fused draw ignores other processors
- {name for name, _ in chain} <= FUSED
+ bool(FUSED)
kernels: padding in the cache is seen
- AttentionMetadata(self.start, lengths, self.ancestors)
+ AttentionMetadata(None, lengths, self.ancestors)

test_kernels_in_use.py::test_nothing_left_to_draw
kernels: a token is made up where none is possible
- if (tokens < 0).any()
+ if False

test_kernels_in_use.py::test_more_new_tokens_than_the_kernel_takes_at_once
kernels: a new token sees those after it
- - (T - first - some.size(2))
+

test_kernels_in_use.py::test_training
kernels: the MLP stays PyTorch's
- LayerNorm | CausalSelfAttention | MLP
+ LayerNorm | CausalSelfAttention

test_kv_cache.py::test_rows_are_what_a_copied_caches_are
kernels: the table of rows outlives its texts
- self.ancestors = self._own_rows() return
+ return

test_sampling.py::test_ids_that_are_no_tokens_ban_nothing
sampling kernel: scores are written behind the vocabulary
- tl.store(scores_ptr + row * V + cols, s, mask=cols < V)
+ tl.store(scores_ptr + row * V + cols, s)

test_cross_entropy.py::test_linear_holds_a_loss_scale_in_float16
cross-entropy kernel: float16 holds no large scale
- (dx.float() * scale).to(dx.dtype)
+ dx * scale.to(dx.dtype)

test_decoder.py::test_any_reordering
cache: keys are reordered, values are not
- for buffer in (self.k, self.v):
+ for buffer in (self.k,):
few rows: what one prompt shares is taken as shared by all
- .all(dim=1).all(dim=0)
+ .all(dim=1).any(dim=0)
few rows: the two parts of attention are weighed the wrong way round
- .sigmoid_()
+ .neg_().sigmoid_()

test_load_generator.py::test_damage_is_found
mapped weights: damage is not found
- if digest is not None and digest.result() != sha256
+ if False

test_load_generator.py::test_memory
narrow weights: malloc keeps the memory it was given back
- _call("malloc_trim", 0)
+

test_tensors.py::test_a_file_that_changed_since_it_was_digested_ahead
digest begun ahead: used for a file that changed since
- return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
+ return state.st_dev, state.st_size

test_tensors.py::test_a_file_that_is_digested_ahead
digest begun ahead: used twice
- _AHEAD.pop((*_state(file), head), None)
+ _AHEAD.get((*_state(file), head))

test_checkpoint.py::test_the_newest_whole_checkpoint_is_found
commit: the manifest first
- entries = {file.name: _digest(file) for
+ (partial / MANIFEST).touch()
+ entries = {file.name: _digest(file) for

test_checkpoint.py::test_what_must_be_on_the_disk_before_what
commit: renamed before its files are on the disk
- for file in partial.iterdir(): sync(file)
+
commit: the rename is not synced
- partial.rename(final) sync(folder)
+ partial.rename(final)

test_checkpoint.py::test_pruning_keeps_the_newest_and_the_best
prune: the best checkpoint goes
- if os.path.realpath(path) not in best:
+ if True:

test_checkpoint.py::test_damaged_checkpoints_after_the_saved_one_do_not_count
prune: damaged checkpoints count among the newest
- if _step_of(p) <= _step_of(saved) and run_of(p) == run
+ if run_of(p) == run

test_checkpoint.py::test_another_runs_checkpoint_is_never_taken
resume: another run's checkpoint
- elif run not in (None, run_of(path)):
+ elif False:

test_checkpoint.py::test_a_touched_folder_still_resumes_and_settles
prune: the best step goes where a person moved the link
- best = {os.path.realpath(folder / "best"), os.path.realpath(folder / f"step-{best_step}")}
+ best = {os.path.realpath(folder / "best")}

test_checkpoint.py::test_a_reader_whose_target_is_deleted_opens_the_new_one
open: the link's old target is final
- if os.path.realpath(name) == target: raise
+ raise

test_kills.py::test_the_store_loses_nothing
prune: before the best is marked
- mark_best(best) publish(saved, out) prune(saved, keep, best_step)
+ prune(saved, keep)
+ publish(saved, out)
+ mark_best(best)
publish: written over the model in use
- (_link if file.name == WEIGHTS else shutil.copyfile)(file, partial)
+ shutil.copyfile(file, out / file.name)
+ shutil.copyfile(file, partial)

test_kills.py::test_a_lock_keeps_two_trainers_out_and_dies_with_its_holder
lock: two trainers share it
- fcntl.LOCK_EX | fcntl.LOCK_NB
+ fcntl.LOCK_SH | fcntl.LOCK_NB

test_kills.py::test_what_the_last_commit_left_undone_is_done_on_resuming
resume: a run without its report counts as finished
- elif "after" in record:
+ else:

test_trainer.py::test_the_best_is_remembered_over_a_stop
resume: the best loss so far is forgotten
- folder.cut_metrics(state["step"])
+ folder.cut_metrics(state["step"])
+ state["best"] = math.inf

test_trainer.py::test_stops_change_no_bit_of_what_else_there_is
resume: the average of the weights begins anew
- self.average.n_averaged.fill_(1)
+ pass

test_train.py::test_metrics_are_on_the_disk_before_the_checkpoint
commit: metrics.jsonl is not on the disk before it
- run.folder.sync_metrics()
+ pass
test_tokenise.py::test_parts_of_another_text_are_not_used
tokenising goes on after a kill: the text's digest is not compared
- if count <= len(made.known) and made.known[count - 1] == digest != NONE:
+ if count <= len(made.known) and digest != NONE:
test_tokenise.py::test_damaged_parts_are_made_again
tokenising goes on after a kill: the ids' digest is not compared
- if count > 0 and hashlib.sha256(ids.tobytes()).hexdigest() == sha256:
+ if count > 0 and len(ids) == count:
test_tokenise.py::test_the_ids_of_two_sides_of_a_cut_are_those_of_the_whole
a text is cut within white space
- return marked if found is None else found.end()
+ return marked if found is None else found.end() + 1
test_shuffle.py::test_every_item_comes_once
the order of sequences: a result beyond the last one is folded back
- item = self._pass(item)
+ item %= self.count
test_mix.py::test_rows_are_those_of_the_corpora_each_in_its_order
a mix: a corpus skips the sequences of the others
- return corpus, before[corpus]
+ return corpus, n
"""


@dataclass(frozen=True)
class Mutant:
    """A snippet of the source, the mistake in its place, and the test that must see it."""

    what: str
    snippet: str
    mistake: str
    test: str

    def places(self) -> list[tuple[Path, re.Match[str]]]:
        """Where the snippet stands, by file relative to the repository."""
        words = re.findall(r"\w+|[^\w\s]", self.snippet)
        # sync(folder) does not stand in fsync(folder)
        start = r"\b" if words[0].isidentifier() else ""
        pattern = re.compile(start + r"\s*".join(map(re.escape, words)))
        return [
            (path.relative_to(ROOT), found)
            for path in shipped_files()
            for found in pattern.finditer(path.read_text())
        ]

    def mutated(self) -> tuple[Path, str]:
        """The file to change and its whole new source. Raises ValueError where none fits."""
        places = self.places()
        if len(places) != 1:
            stand = ", ".join(f"{path}:{line_of(found)}" for path, found in places) or "nowhere"
            raise ValueError(
                f"mutant {self.what!r}: expected {self.snippet!r} once in the source, found it "
                f"{stand}; change its snippet in tests/mutants.py"
            )
        [(path, found)] = places
        mistake = self.mistake
        source, start = found.string, found.start()
        if not mistake and not source[source.rfind("\n", 0, start) + 1 : start].strip():
            mistake = "pass"
        return path, source[:start] + mistake + source[found.end() :]

    def write_copy(self, folder: Path) -> None:
        """Copy the repository to a folder, with the mistake in it."""
        path, source = self.mutated()
        copy_repository(folder)
        (folder / path).write_text(source)


def line_of(found: re.Match[str]) -> int:
    return found.string.count("\n", 0, found.start()) + 1


def shipped_files() -> list[Path]:
    # nanogpt2/ has links to kernels/ and the two scripts: read each file once
    found = [path for name in SHIPPED for path in [ROOT / name, *(ROOT / name).rglob("*.py")]]
    return sorted({path.resolve() for path in found if path.is_file()})


def copy_repository(folder: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", ".*", "assets")
    for name in (*SHIPPED, *NEEDED):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "nanogpt2/assets").symlink_to(ROOT / "nanogpt2/assets")


def read(table: str) -> list[Mutant]:
    """Read the table; the module says how it is written."""
    mutants, test, what = [], "", ""
    removed: list[str] = []
    added: list[str] = []
    for line in [*table.splitlines(), ""]:
        mark, text = line[:1], line[2:]
        if mark == "-":
            removed = [text]
        elif mark == "+":
            added.append(text)
        else:
            if added:
                mutants.append(Mutant(what, *removed, "; ".join(added), test))
                removed, added = [], []
            if re.match(r"test_\w+\.py", line):
                test = line
            elif line:
                what = line
    return mutants


MUTANTS = read(TABLE)
