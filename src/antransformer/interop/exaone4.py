"""anGPT as EXAONE-4: the folded model, scaled so that two extra norms are linear and the epsilon of all norms vanishes.

EXAONE-4 has the operations of a folded anGPT and a final norm. One epsilon serves all norms. It is large compared with
the residual stream, so the final norm multiplies by a constant, and small compared with whatever the other norms read.
Let e be the root of epsilon. The stream has RMS e / 2^a at the final norm, and q, k and the sublayer outputs have RMS
e 2^b. The relative errors are 2^-(2a + 1), common to all logits of a token, and 2^-(2b + 1). All scales are powers of
two, so they round nothing. Gains compensate the mean of both errors.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from antransformer.errors import CheckpointError
from antransformer.inference.folding import FoldedAnGPT, FoldedBlock, fold
from antransformer.interop.stock_weights import StockModel, head_scores, power_of_two, rope_of, split_qkv
from antransformer.models import Decoder
from antransformer.models.config import ModelConfig

STREAM = 2.0**-3  # RMS of the residual stream at the final norm
EXPONENTS = (10, 10)  # a and b for dtypes with the range of float32
# In float16 large weights overflow. The error of a leaves the order of the logits unchanged, so a is lowered first.
FLOAT16_EXPONENTS = ((7, 7), (6, 7), (5, 7), (4, 7), (4, 6), (4, 5))
SAMPLE = (4, 256)  # sequences and tokens of random ids whose activations are measured


def exaone4(model: Decoder, where: str, float16: bool = False) -> StockModel:
    """Return an anGPT in the layout of EXAONE-4.

    Args:
        model: trained model; it is converted to float64 in place.
        where: name of the checkpoint in errors.
        float16: choose scales with which everything fits float16.

    Raises:
        CheckpointError: the model cannot be folded, or does not fit float16.
    """
    rope = rope_of(model.config, where)
    try:
        folded = fold(model.double())
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}: use --format native") from error
    measured = Activations(folded)
    for exponents in FLOAT16_EXPONENTS if float16 else (EXPONENTS,):
        scaled = _Scaled(folded, measured, *exponents)
        stock = StockModel("exaone4", model.config, scaled.weights(), scaled.root_eps**2, rope, scaled.peak)
        if not float16 or stock.fits_float16():
            return stock
    raise CheckpointError(
        f"{where}: weights or activations overflow in float16, since the residual stream grows over the layers: "
        "use bfloat16 or float32"
    )


class Activations:
    """Activations of a folded model on random token ids.

    Attributes:
        mean_square: mean squares of outputs of linear maps, for q, k and v by head.
        inverse: means over the tokens of 1 / mean square, the weight of epsilon in a norm.
        peak: largest magnitudes.
        stream: mean square of the residual stream at its end.
    """

    @torch.no_grad()
    def __init__(self, model: FoldedAnGPT) -> None:
        self.mean_square: dict[str, Tensor] = {}
        self.inverse: dict[str, Tensor] = {}
        self.peak: dict[str, Tensor] = {}
        self.heads = model.config.heads
        hooks = []
        for index, block in enumerate(model.blocks):
            for name in ("qkv_proj", "out_proj", "down_proj"):
                hooks.append(getattr(block, name).register_forward_hook(self._hook(f"{index}.{name}")))
        batch, length = SAMPLE
        generator = torch.Generator().manual_seed(0)
        size = (batch, min(length, model.config.context))
        tokens = torch.randint(model.config.vocab_size, size, generator=generator)
        self.stream = float(model.hidden(tokens).square().mean())
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            # q, k and v of each head, or the whole output
            values = output.unflatten(-1, (self.heads, 3, -1) if name.endswith("qkv_proj") else (1, 1, -1))
            squares = values.square().mean(dim=-1)
            self.mean_square[name] = squares.mean(dim=(0, 1))
            inverse = torch.where(squares > 0, squares.reciprocal(), 0.0)  # epsilon cannot change a norm of zero
            self.inverse[name] = inverse.mean(dim=(0, 1))
            self.peak[name] = values.abs().amax(dim=(0, 1, 4))
            self.mean_square[f"{name}.input"] = inputs[0].square().mean()

        return record


class _Scaled:
    """The folded model with the scales of one choice of a and b.

    Attributes:
        root_eps: root of the epsilon of all norms.
        peak: largest magnitude of q, k and the sublayer outputs.
    """

    def __init__(self, model: FoldedAnGPT, measured: Activations, a: int, b: int) -> None:
        self.model, self.measured = model, measured
        self.root_eps = STREAM * 2.0**a
        self.sublayer = self.root_eps * 2.0**b
        self.stream = float(power_of_two(STREAM, torch.tensor(measured.stream).sqrt()))
        self.peak = 0.0

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by their names in transformers."""
        final = math.hypot(self.root_eps, self.stream * math.sqrt(self.measured.stream))
        width = self.model.config.width
        weights = {
            "model.embed_tokens.weight": self.model.embedding.weight * self.stream,
            # The norm divides by about the root of epsilon, and the head undoes the scale of the stream.
            "model.norm.weight": torch.full((width,), final, dtype=torch.float64),
            "lm_head.weight": self.model.lm_head.weight / self.stream,
        }
        for index, block in enumerate(self.model.blocks):
            assert isinstance(block, FoldedBlock)
            for name, weight in (self.attention(index, block) | self.mlp(index, block)).items():
                weights[f"model.layers.{index}.{name}.weight"] = weight
        return {name: weight.detach().contiguous() for name, weight in weights.items()}

    def attention(self, index: int, block: FoldedBlock) -> dict[str, Tensor]:
        """Return the weights of one attention sublayer."""
        config: ModelConfig = self.model.config
        q, k, v = split_qkv(block.qkv_proj.weight, config)
        square = self.measured.mean_square[f"{index}.qkv_proj"]
        gains, weights = head_scores(block.score_scale, config.head_dim), {}
        for column, (name, weight, gain) in enumerate((("q", q, gains[0]), ("k", k, gains[1]))):
            # Each head has a norm, so each has a scale.
            scale = power_of_two(self.sublayer, square[:, column].sqrt())
            inverse = self.measured.inverse[f"{index}.qkv_proj"][:, column] / scale.square()
            self.note_peak(scale * self.measured.peak[f"{index}.qkv_proj"][:, column])
            weights[f"self_attn.{name}_proj"] = (weight * (scale / self.stream)[:, None, None]).flatten(0, 1)
            value = gain * self.compensation(inverse)
            weights[f"self_attn.{name}_norm"] = torch.full((config.head_dim,), value, dtype=torch.float64)
        inner = power_of_two(self.root_eps, square[:, 2].mean().sqrt())
        weights["self_attn.v_proj"] = v.flatten(0, 1) * inner / self.stream
        weights["self_attn.o_proj"], weights["post_attention_layernorm"] = self.output(
            f"{index}.out_proj", block.out_proj.weight, block.attention_gain, inner
        )
        return weights

    def mlp(self, index: int, block: FoldedBlock) -> dict[str, Tensor]:
        """Return the weights of one MLP."""
        inner = power_of_two(self.root_eps, self.measured.mean_square[f"{index}.down_proj.input"].sqrt())
        down, gain = self.output(f"{index}.down_proj", block.down_proj.weight, block.mlp_gain, inner)
        return {
            "mlp.gate_proj": block.gate_proj.weight / self.stream,
            "mlp.up_proj": block.up_proj.weight * inner / self.stream,
            "mlp.down_proj": down,
            "post_feedforward_layernorm": gain,
        }

    def output(self, name: str, weight: Tensor, gain: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last weight of a sublayer, whose input is scaled by ``inner``, and the gain of its norm."""
        scale = power_of_two(self.sublayer, self.measured.mean_square[name].sqrt())
        self.note_peak(scale * self.measured.peak[name])
        compensation = self.compensation(self.measured.inverse[name] / scale.square())
        return weight * scale / inner, gain * self.stream * compensation

    def note_peak(self, magnitudes: Tensor) -> None:
        """Raise ``peak`` to the largest of these magnitudes."""
        self.peak = max(self.peak, float(magnitudes.max()))

    def compensation(self, inverse: Tensor) -> float:
        """Return the factor that undoes the mean effect of epsilon in a norm, for means of 1 / mean square."""
        return math.sqrt(1 + self.root_eps**2 * float(inverse.mean()))
