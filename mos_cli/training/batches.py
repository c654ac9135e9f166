"""Training batches: a function from a step's number to the tensors of the loss.

Shapes: B examples of this process, N pictures of each, T context tokens, V image tokens, M layers, S width of a state,
Z widest state of an image token, C channels, H x W the latent's size.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.errors import InputError, MosError, UsageError
from mos_cli.sampling.flow import logit_normal, noised
from mos_cli.sampling.graphs import Capture
from mos_cli.towers.autoencoder import Autoencoder
from mos_cli.towers.bank import Grid
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.understanding import HiddenStates, ImageInput, UnderstandingTower
from mos_cli.towers.vision_language import VisionLanguageTower
from mos_cli.training.graphs import TrainingGraphs
from mos_cli.training.picks import Draw, Kind, Picked, Picks, Share, Source, source_of, too_long
from mos_cli.training.recipe import TrainTable
from mos_cli.training.stages import Curriculum

WITHOUT_GUIDANCE = 0.2
"""The share of pictures with the scale 1 where guidance is distilled."""
AHEAD = 2
"""The most steps that a GPU has still to compute when the next batch is made."""
VALIDATION_TIMES = (0.2, 0.4, 0.6, 0.8)
"""The times at which the loss of held-out pictures is measured."""


@dataclass(frozen=True)
class Batch:
    """Clean and noised latents, their times, and the hidden states of the captions.

    For edits also the clean latents of the pictures before the edit, and the states of their image tokens if there is
    an image encoder. With vision the image tokens, on `grid`, come after the words in `states_BTMS`.

    Where guidance is distilled also its scales, and the states of as many empty prompts.
    """

    z0_BCHW: Tensor
    z_BCHW: Tensor
    t_B: Tensor
    states_BTMS: Tensor
    mask_BT: Tensor
    references_BCHW: Tensor | None = None
    image_states_BVMZ: Tensor | None = None
    grid: Grid = (IMAGE_GRID, IMAGE_GRID)
    guidance_B: Tensor | None = None
    empty_BTMS: Tensor | None = None
    empty_mask_BT: Tensor | None = None


@dataclass(frozen=True)
class _Encoded:
    """What a batch has of its pictures and captions; `grid` as in `Batch`."""

    z0_BCHW: Tensor
    states_BTMS: Tensor
    mask_BT: Tensor
    references_BCHW: Tensor | None = None
    image_states_BVMZ: Tensor | None = None
    grid: Grid = (IMAGE_GRID, IMAGE_GRID)


class Batches:
    """Makes batches on one device: draws and encodes pictures and encodes captions.

    Args:
        sources: one for every kind of step.
        share: the part of each batch that is made here.
        image_encoder: encodes the pictures before an edit, for an understanding tower without vision.
        guidance_max: the largest scale, where guidance is distilled.

    Raises:
        UsageError: a stage's batch cannot be shared out evenly.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        train: TrainTable,
        sources: dict[Kind, Source],
        understanding: UnderstandingTower,
        autoencoder: Autoencoder,
        device: torch.device,
        share: Share = Share(),
        image_encoder: ImageEncoder | None = None,
        guidance_max: float | None = None,
    ) -> None:
        for stage in curriculum.stages:
            if stage.batch % share.processes:
                raise UsageError(f"a batch of {stage.batch} cannot be shared by {share.processes} processes")
        self.train, self.sources, self.share, self.guidance_max = train, sources, share, guidance_max
        self.understanding, self.autoencoder, self.image_encoder, self.device = (
            understanding,
            autoencoder,
            image_encoder,
            device,
        )
        tokenizer = None if isinstance(understanding, VisionLanguageTower) else understanding.prompt_tokenizer
        self.picks = Picks(curriculum, train, sources, tokenizer, share)
        self._capture: Callable[[Any], Capture] | None = None
        self._graphs: dict[str, TrainingGraphs] = {}

    def replay(self, capture: Callable[[Any], Capture], say: Callable[[str], None]) -> None:
        """Draws, encodes and reads batches of static sources by replaying CUDA graphs, one for each kind of steps.

        Their captions are padded before they are read, from now on, so that all batches have the same shapes.

        Args:
            capture: makes the capture of a stage's batches, from the stream on which they are made.
            say: takes the line that says why they are not captured.
        """

        def failed(cause: str) -> None:
            self._capture = None
            say(f"batches are made without CUDA graphs, slower: {cause}")

        self._capture, self._failed = capture, failed
        self.picks = replace(self.picks, padded=True)

    @property
    def curriculum(self) -> Curriculum:
        return self.picks.curriculum

    def follow(self, curriculum: Curriculum) -> None:
        """Makes the batches of another curriculum, in which other stages have begun."""
        self.picks = replace(self.picks, curriculum=curriculum)

    def make(self, step: int) -> Batch:
        """The batch of one step, from the step's own random seed, so that resuming needs no state.

        Raises:
            InputError: a picture cannot be read.
            UsageError: a caption does not fit into `context_tokens`.
        """
        return self.finish(self.picks[step])

    def names(self, step: int) -> list[str]:
        """The names of the files of a step's pictures, or where they have none the captions."""
        stage = self.curriculum.stage_at(step)
        source = source_of(self.sources, self.curriculum, self.train.seed, step)
        randoms = [Random(f"{self.train.seed}/{step}/{index}") for index in range(stage.batch)]
        if source.name is None:
            return [source.pick(random, stage.canvas)[1] for random in randoms]
        return [source.name(random) for random in randoms]

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions of all captioned pictures that are no edits."""
        sources = [source for (_, edits), source in self.sources.items() if not edits]
        return tuple(dict.fromkeys(caption for source in sources for caption in source.captions))

    def stream(self, first: int) -> Iterator[Batch]:
        """The batches from step `first` to the end of the run, without end in one with a time; raises as `make` does.

        On a GPU, worker processes pick ahead, and batches are made while the GPU computes the step before.
        """
        workers = _workers(self.device)
        picked = DataLoader(
            self.picks,  # type: ignore[arg-type]
            sampler=self.curriculum.steps_from(first),
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=4 if workers else None,
            pin_memory=self.device.type == "cuda",
        )
        if self.device.type != "cuda":
            yield from map(self.finish, picked)
            return
        steps: deque[Any] = deque()
        for each in picked:
            if len(steps) > AHEAD:
                # Batches far ahead would fill the memory, and a clock would be read long before its step.
                steps.popleft().synchronize()
            yield self.finish(each)
            steps.append(torch.cuda.current_stream(self.device).record_event())

    @cached_property
    def _side(self) -> torch.cuda.Stream | None:
        """The CUDA stream on which batches are made, beside the steps."""
        if self.device.type != "cuda":
            return None
        side = torch.cuda.Stream(self.device, priority=-1)
        side.wait_stream(torch.cuda.current_stream(self.device))
        return side

    def finish(self, picked: Picked | MosError) -> Batch:
        """The batch of what was picked, the part of `make` that needs the device; raises an error that was returned.

        On a GPU it is made on a stream of its own, where CUDA graphs of batches are replayed one after the other. What
        a replay writes is copied there before the next replay, so that a step reads memory that no replay writes.
        """
        if isinstance(picked, MosError):
            raise picked
        if self._side is None:
            return self._finish(picked)
        with torch.cuda.stream(self._side):
            batch = self._finish(picked)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._side)
        for field in fields(batch):
            if isinstance(tensor := getattr(batch, field.name), Tensor):
                # Batches do not get its memory again before the step has read it.
                tensor.record_stream(current)
        return batch

    def _finish(self, picked: Picked) -> Batch:
        stage = self.curriculum.stage_at(picked.step)
        source = source_of(self.sources, self.curriculum, self.train.seed, picked.step)
        part = self.share.of(stage.batch)
        random = Random(f"{self.train.seed}/{picked.step}")
        times = torch.Generator().manual_seed(random.getrandbits(63))
        noise = torch.Generator(self.device).manual_seed(random.getrandbits(63))
        t = self._on_device(logit_normal(stage.batch, stage.time_mean, self.train.time_std, times)[part])
        pictures, captions, how = picked.pictures, picked.captions, (source.draw, source.edits, stage.canvas)
        if self._capture is None or not source.static or not isinstance(captions, Tensor):
            encoded = self._encoded(pictures, captions, *how)
        else:
            if stage.name not in self._graphs:
                # None of the kinds of the stage before comes again.
                self._graphs = {stage.name: TrainingGraphs(self._encoded, self._capture(self._side), self._failed)}
            encoded = self._graphs[stage.name](self._on_device(pictures), self._on_device(captions), *how)
        # Outside of a graph, which knows no other generator than that of the device. For the whole batch, as that costs
        # an accelerator less than a generator for each picture.
        batch = self._noised(encoded, t, noise, stage.batch, part)
        if self.guidance_max is None:
            return batch
        draws_2B = self._on_device(torch.rand(2, stage.batch, generator=times)[:, part])
        scales = 1 + (self.guidance_max - 1) * draws_2B[0]
        return self._distilled(batch, scales.where(draws_2B[1] > WITHOUT_GUIDANCE, 1.0))

    def validation(self, step: int) -> Iterator[Batch]:
        """The held-out pictures, each at the same times with the same noise after every step; raises as `make`."""
        stage = self.curriculum.stage_at(step - 1)
        for edits in (False, True):
            source = self.sources.get((stage.name, edits))
            # In a stage all of whose steps train edits, pictures are not looked at, and the reverse.
            if source is None or stage.edits == (0.0 if edits else 1.0):
                continue
            for number, one in enumerate(source.buckets or (source,)):
                held_out = [] if one.held_out is None else one.held_out(stage.canvas)
                for first in range(0, len(held_out), stage.batch):
                    pairs = held_out[first : first + stage.batch]
                    captions = self.picks.readable([caption for _, caption in pairs])
                    pictures = one.collate([picture for picture, _ in pairs])
                    encoded = self._encoded(pictures, captions, one.draw, edits, stage.canvas)
                    for place, time in enumerate(VALIDATION_TIMES):
                        t = torch.full((len(pairs),), time, device=self.device)
                        seed = Random(f"{self.train.seed}/validation/{edits}/{number}/{first}/{place}").getrandbits(63)
                        noise = torch.Generator(self.device).manual_seed(seed)
                        batch = self._noised(encoded, t, noise, len(pairs))
                        if self.guidance_max is not None:
                            batch = self._distilled(batch, torch.full_like(t, (1 + self.guidance_max) / 2))
                        yield batch

    def _distilled(self, batch: Batch, guidance_B: Tensor) -> Batch:
        """The batch with what distillation needs. A tower with vision reads the pictures with the empty prompts."""
        count = len(guidance_B)
        if batch.references_BCHW is not None and self.image_encoder is None:
            before_B3HW = self.autoencoder.decode(batch.references_BCHW)
            states, mask, _ = self._read_with_images([""] * count, before_B3HW)
        else:
            states, mask = (self._padded(part) for part in self._empty)
            states, mask = states.expand(count, -1, -1, -1), mask.expand(count, -1)
        return replace(batch, guidance_B=guidance_B, empty_BTMS=states, empty_mask_BT=mask)

    @cached_property
    def _empty(self) -> tuple[Tensor, Tensor]:
        """States and mask of the empty prompt."""
        states = self.understanding.encode([""])
        return states.states_BTMS, states.mask_BT

    def _on_device(self, tensor: Tensor) -> Tensor:
        # From other than pinned memory the host would wait until all that is queued before has been computed.
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def _noised(
        self, encoded: _Encoded, t: Tensor, noise: torch.Generator, whole: int, part: slice = slice(None)
    ) -> Batch:
        """The batch at times `t`, with the `part` that is its own of the noise for `whole` pictures."""
        z0 = encoded.z0_BCHW
        z1 = torch.randn(whole, *z0.shape[1:], generator=noise, device=self.device)[part]
        return Batch(
            z0,
            noised(z0, z1, t),
            t,
            encoded.states_BTMS,
            encoded.mask_BT,
            encoded.references_BCHW,
            encoded.image_states_BVMZ,
            encoded.grid,
        )

    def _encoded(self, pictures: Any, captions: Tensor | list[str], draw: Draw, edits: bool, canvas: int) -> _Encoded:
        """The pictures and captions of `Picked`. The part of `finish` that a CUDA graph may be captured of.

        Args:
            draw, edits: of the source.
        """
        reads_pictures = edits and self.image_encoder is None
        # First of all: transformers looks at the mask on the host, which waits for what is queued before. Within a
        # capture it does not look, and takes the mask as it would anyway where a caption has padding.
        words = None if reads_pictures else self._read(captions)
        drawn_BN3HW = draw(pictures, canvas)
        z0 = self.autoencoder.encode(drawn_BN3HW[:, 0])
        if not edits:
            assert words is not None
            return _Encoded(z0, *words)
        before = drawn_BN3HW[:, 1]
        references = self.autoencoder.encode(before)
        if words is not None:
            assert self.image_encoder is not None
            return _Encoded(z0, *words, references, self.image_encoder.encode_images(before))
        assert isinstance(captions, list)
        states, mask, grid = self._read_with_images(captions, before)
        return _Encoded(z0, states, mask, references, grid=grid)

    def _read_with_images(self, captions: list[str], before_B3HW: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """States and mask of captions with one picture each, and the grid of their image tokens.

        The image tokens, at the same place in all prompts, are moved behind the words, which are padded.
        """
        states = self._checked(captions, [[picture] for picture in before_B3HW])
        (span,) = states.image_spans[0]
        image = slice(span.first, span.first + span.rows * span.columns)

        def words_first(part: Tensor) -> Tensor:
            words = torch.cat([part[:, : image.start], part[:, image.stop :]], dim=1)
            return torch.cat([self._padded(words), part[:, image]], dim=1)

        return words_first(states.states_BTMS), words_first(states.mask_BT), (span.rows, span.columns)

    def _read(self, captions: Tensor | list[str]) -> tuple[Tensor, Tensor]:
        """States and mask of captions, padded."""
        if isinstance(captions, list):
            states = self._checked(captions)
            return self._padded(states.states_BTMS), self._padded(states.mask_BT)
        ids_BT, mask_BT = captions.to(self.device, non_blocking=True)
        return self._padded(self.understanding.states(ids_BT, mask_BT)), self._padded(mask_BT.bool())

    def _padded(self, words: Tensor) -> Tensor:
        """Words [B, T, ...] padded to `context_tokens`."""
        missing = self.train.context_tokens - words.shape[1]
        # Padding by nothing would be a copy.
        return F.pad(words, (0, 0) * (words.ndim - 2) + (0, missing)) if missing else words

    def _checked(self, captions: list[str], pictures: Sequence[Sequence[ImageInput]] = ()) -> HiddenStates:
        """The hidden states; raises UsageError if a caption is longer than `context_tokens` or what the tower takes."""
        try:
            states = self.understanding.encode(captions, pictures)
        except InputError:
            states = None
        if states is not None:
            image_tokens = sum(span.rows * span.columns for span in states.image_spans[0])
            if states.mask_BT.shape[1] - image_tokens <= self.train.context_tokens:
                return states
        raise too_long(captions, self.understanding.prompt_tokenizer, self.train.context_tokens)


def _workers(device: torch.device) -> int:
    """The number of processes that pick ahead: none on a CPU, whose cores are busy."""
    if device.type != "cuda":
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // local - 1))


def _unchanged(picked: Any) -> Any:
    return picked
