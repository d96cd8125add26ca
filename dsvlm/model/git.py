"""`GitVlm`: vision encoder, connector and language model under the GIT mask."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel

from dsvlm.config import MoeConfig, build
from dsvlm.data.encode import IGNORE
from dsvlm.model.backbone import build_decoder, kind_of
from dsvlm.model.backbone.attention import register
from dsvlm.model.connector import Connector
from dsvlm.model.dropout import KeyedDropout, image_keys
from dsvlm.model.heads import HeadBank
from dsvlm.model.loss import VocabHead
from dsvlm.model.moe_groups import MoeContext
from dsvlm.model.moe_losses import check_gradient, summarise
from dsvlm.model.moe_place import moe_layers, place_experts
from dsvlm.model.rows import Layout, assemble, lay_out
from dsvlm.model.vision import VisionEncoder, build_tower

if TYPE_CHECKING:
    from dsvlm.data.collate import Batch


class GitVlmConfig(PreTrainedConfig):
    """Configuration of a `GitVlm`.

    decoder_kind: key of `backbone.KINDS`; vision_settings, decoder_settings: the parts' own configurations as dicts;
    heads: classes per task head; image_mean, image_std: per channel, of pixels scaled to [0, 1]; moe: fields
    of a `MoeConfig`.
    """

    model_type = "dsvlm_git"

    decoder_kind: str = "opt"
    vision_settings: dict | None = None
    decoder_settings: dict | None = None
    heads: dict | None = None
    moe: dict | None = None
    image_mean: list | None = None
    image_std: list | None = None
    loss_chunk: int = 1024
    initializer_range: float = 0.02  # of the connector and the heads: PreTrainedModel._init_weights reads it
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


class GitVlm(PreTrainedModel):
    """A vision-language model whose every forward runs every module, whatever the batch holds.

    A sample is [own image tokens | own text]; its images see each other, its text sees them and its past. A row holds a
    sample, or several that do not see each other. A batch without images brings one dummy image; all heads of the bank
    run on all samples. Under ZeRO-3 ranks then agree on the modules.
    """

    config_class = GitVlmConfig
    main_input_name = "pixels"
    supports_gradient_checkpointing = True

    def __init__(
        self, config: GitVlmConfig, tower: CLIPVisionModel | None = None, decoder: PreTrainedModel | None = None
    ):
        super().__init__(config)
        register()
        kind = kind_of(config.decoder_kind)
        tower = tower or build_tower(config.vision_settings)
        decoder = decoder or build_decoder(kind, config.decoder_settings)
        head = VocabHead(decoder.get_output_embeddings().weight, config.loss_chunk)
        decoder.set_output_embeddings(head)
        self.vision = VisionEncoder(tower, config.image_mean, config.image_std)
        self.connector = Connector(
            tower.config.hidden_size,
            decoder.get_input_embeddings().embedding_dim,
            eps=tower.config.layer_norm_eps,
        )
        self.decoder = decoder
        self.heads = HeadBank(config.heads or {}, head.in_features)
        self.experts = build(MoeConfig, config.moe, "moe") if config.moe else None
        if self.experts:
            place_experts(self, self.experts)
        self.post_init()

    @property
    def flow(self) -> ModuleType:
        """The decoder kind's `states` and `greedy`; looked up, because a model must pickle and a module cannot."""
        return kind_of(self.config.decoder_kind).flow

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> VocabHead:
        return self.decoder.get_output_embeddings()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch as a sum, for normalisation over a window.

        Returns loss_sum [] = sum over targets of weight * nll (head losses included), at least fp32; and detached, per
        sample [B]: nll (unweighted sum), count (int64 targets), correct (int64 targets predicted right), positions
        (int64, its images and text in the row; an encoder-decoder's source), slots (float64 positions computed for it).
        With experts also aux [2], the sums over images and over texts of the routing's losses, for normalisation over
        the window's; and routing, figures of it as in `moe_losses.Told`.
        """
        with self.keyed_dropout(batch):
            layout, hidden, row, start, pooled = self._states(batch, listens=True)
        told = self._told()
        live = batch.targets != IGNORE
        sample, column = live.nonzero(as_tuple=True)
        loss, nll, correct = self.get_output_embeddings()(
            hidden[row[sample], start[sample] + column], batch.targets[sample, column], batch.weight[sample]
        )
        head_loss, head_nll, head_correct = self.heads(pooled, batch.head, batch.label, batch.weight)
        # scattered back to [B, L] and summed along it: no atomic additions, so equal in every run
        table = torch.zeros(live.shape, dtype=nll.dtype, device=nll.device)
        return {
            "loss_sum": loss + head_loss,
            "nll": table.masked_scatter(live, nll).sum(dim=1) + head_nll,
            "count": live.sum(dim=1) + (batch.head >= 0),
            "correct": live.masked_scatter(live, correct).sum(dim=1) + head_correct,
            "positions": layout.lengths,
            "slots": layout.slots,
            **told,
        }

    def logits(self, batch: Batch) -> Tensor:
        """[B, L, vocab] logits at the positions of `batch.targets`: the whole tensor, for tests and evaluation."""
        with self.keyed_dropout(batch):
            _, hidden, row, start, _ = self._states(batch)
        column = torch.arange(batch.targets.shape[1], device=hidden.device)
        position = (start[:, None] + column).clamp(max=hidden.shape[1] - 1)
        return self.get_output_embeddings()(hidden[row[:, None], position])

    def head_logits(self, batch: Batch, head: int) -> Tensor:
        """[B, classes] logits of one head of the bank."""
        with self.keyed_dropout(batch):
            return self.heads.logits(self._states(batch)[-1], head)

    @torch.no_grad()
    def generate(
        self, pixels: Tensor, image_row: Tensor, tokens: Tensor, lengths: Tensor, max_new_tokens: int, eos_id: int
    ) -> Tensor:
        """Greedy decoding of prompts of any lengths and numbers of images, batched, with a cache.

        pixels, image_row, tokens, lengths: as in `Batch`. Returns [B, <= max_new_tokens] int64, pad after EOS.
        """
        if max_new_tokens < 1:
            raise ValueError(f"generate: max_new_tokens {max_new_tokens} must be at least 1")
        training = self.training
        self.eval()
        try:
            layout = lay_out(image_row, self.vision.tokens, lengths, flush_right=self.flow.FLUSH_RIGHT)
            self._tell_experts(layout, image_row, torch.zeros_like(lengths), torch.ones_like(lengths))
            embeds = self._embeds(layout, pixels, tokens)
            return self.flow.greedy(self.decoder, embeds, layout, max_new_tokens, eos_id, self.config.pad_token_id)
        finally:
            self.train(training)

    def keyed_dropout(self, batch: Batch) -> AbstractContextManager:
        """The context in which dropout is drawn per sample; no effect in evaluation or in a model without dropout.

        Hold it around the backward, too, when layers are recomputed there.
        """
        if not self._drops():
            return nullcontext()
        _, image_row = self._images(batch)
        images = image_keys(batch.keys, image_row)
        if batch.row is None:
            return KeyedDropout(batch.keys, images)
        layout = self._layout(batch, image_row)
        return KeyedDropout(batch.keys[layout.sample.clamp(min=0)], images, layout.position)

    def _drops(self) -> bool:
        names = ("p", "dropout", "attention_dropout", "activation_dropout")
        values = (vars(module).get(name) for module in self.modules() for name in names)
        return self.training and any(isinstance(value, float) and value > 0.0 for value in values)

    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels and image rows; with dropout, a dummy more where as many images as rows could be taken for rows."""
        pixels, image_row = batch.pixels, batch.image_row
        if batch.row is None:
            index = torch.arange(len(batch.tokens), device=image_row.device)
            ambiguous = len(image_row) == len(index) and not torch.equal(image_row, index)
        else:
            ambiguous = len(image_row) == int(batch.row[-1]) + 1
        if not ambiguous or not self._drops():
            return pixels, image_row
        return torch.cat((pixels, torch.zeros_like(pixels[:1]))), nn.functional.pad(image_row, (0, 1), value=-1)

    def _states(self, batch: Batch, listens=False) -> tuple[Layout, Tensor, Tensor, Tensor, Tensor]:
        pixels, image_row = self._images(batch)
        layout = self._layout(batch, image_row)
        self._tell_experts(layout, image_row, batch.keys, batch.weight, packed=batch.row is not None, listens=listens)
        return layout, *self.flow.states(self.decoder, self._embeds(layout, pixels, batch.tokens), layout, batch)

    def _tell_experts(self, layout: Layout, image_row: Tensor, keys: Tensor, weight: Tensor, **more: bool) -> None:
        """Tells every layer of experts whose its tokens are; layers recomputed in the backward ask again."""
        if not self.experts:
            return
        context = MoeContext(
            layout, image_row, self.vision.tokens, keys, weight > 0, by_unit=self.experts.group == "unit",
            training=self.training, **more,
        )  # fmt: skip
        for layer in moe_layers(self):
            layer.context = context

    def _told(self) -> dict[str, Tensor]:
        if not self.experts:
            return {}
        layers = moe_layers(self)
        told = layers[0].context.close()
        check_gradient(told, {layer.name for layer in layers if layer.router.weight.requires_grad}, self.experts)
        told = summarise(told, [layer.name for layer in layers], self.experts)
        return {"aux": told.loss, "routing": told.figures}

    def _layout(self, batch: Batch, image_row: Tensor) -> Layout:
        return lay_out(image_row, self.vision.tokens, batch.lengths, row=batch.row, width=batch.width)

    def _embeds(self, layout: Layout, pixels: Tensor, tokens: Tensor) -> Tensor:
        return assemble(layout, self.connector(self.vision(pixels)), tokens, self.get_input_embeddings())
