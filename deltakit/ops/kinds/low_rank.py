"""Low-rank updates: y' = y + scaling * B A x, and the same update of a weight."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import (
    DeltaModule,
    Design,
    FeatureSlice,
    MixedBatch,
    OutputHook,
    Target,
    WeightView,
    checked,
    hidden_input,
    hidden_output,
    is_quantized,
    replace_hidden,
    weight_view,
    wide,
)
from deltakit.errors import StateError
from deltakit.ops.fast_paths import fresh, hooked_everywhere, is_dense, must_copy
from deltakit.ops.few_tokens import WHOLE_LAYERS, FewTokensHook
from deltakit.ops.forwards import has_own_forward
from deltakit.ops.kinds.output_map import OutputMap
from deltakit.ops.low_rank import add_low_rank, convolved
from deltakit.ops.low_rank_batched import add_per_example, shared_work
from deltakit.ops.low_rank_plain import Product
from deltakit.ops.option_checks import check_dropout
from deltakit.ops.sizes import sizes

_CONVOLUTIONS = nn.modules.conv._ConvNd
_LayerKind = Literal["linear", "product", "slice", "convolution", "embedding"]
_LINEAR: tuple[_LayerKind, ...] = (*WHOLE_LAYERS, "slice")
# A name of this module saves two lookups, in every call of every target.
_is_compiling = torch.compiler.is_compiling


class LowRank(OutputMap):
    """Adds a product of two thin factors. The author writes `factors() -> (A, B)`, A [*stack, r, d_in], B [*stack, d_out, r].

    For few tokens without gradients, and in mixed batches, the factors alone are read: a `forward` or `add_product` of your
    own must agree. A subclass that overrides `factors` alone loses the `add_product` of the class above it.

    It works on linear layers, feature slices of fused projections, embeddings (d_in is the vocabulary), convolutions (d_in is
    the channels of a group times the size of the kernel), parameters (stacks of experts), and weights that are read directly.

    Args:
        scaling: the factor of the product.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        keep: "exact", or "int8" to save the inputs for the backward pass with one byte per value.

    Raises:
        TargetError: if the target is none of these.
        OptionError: if `dropout` is out of its range.
    """

    design: ClassVar[Design] = Design(
        form="B A x", changes="output", insertion="parallel", composition="scaled addition"
    )
    has_weight_form: ClassVar[bool] = True
    output_hook: ClassVar[type[OutputHook]] = FewTokensHook

    d_in: int
    d_out: int
    view: WeightView
    scaling: float
    dropout: float
    keep: Literal["exact", "int8"]
    layer_kind: _LayerKind

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # That hook adds the product instead of `after_call`. So a class that has its own gets the usual one.
        if "output_hook" not in vars(cls):
            cls.output_hook = FewTokensHook if cls.after_call is LowRank.after_call else OutputHook

    @checked
    def __init__(
        self, target: Target, *, scaling: float = 1.0, dropout: float = 0.0, keep: Literal["exact", "int8"] = "exact"
    ) -> None:
        check_dropout(self.word(), dropout)
        # OutputMap.__init__ reads the output size and the feature axis of a module, which a parameter does not have.
        DeltaModule.__init__(self)
        # nn.Module asks of each attribute whether it is a tensor or a module, which was a third of the time to build a delta
        # module. One by one, because `update` would take them out of the table that all instances share (`AttachedModule`).
        own = self.__dict__
        own["d_in"], own["d_out"] = sizes(target, self.word())
        own["view"] = weight_view(target)
        own["scaling"], own["dropout"], own["keep"] = scaling, dropout, keep
        own["layer_kind"] = self._layer_kind(target)

    def _layer_kind(self, target: Target) -> _LayerKind:
        """Returns in which of five ways the product is added; "product" by `add_product`.

        One answer to all questions about the target and the class, because compiled code has a guard for each that is asked.
        """
        module = None if target.parameter else target.module
        if isinstance(module, nn.Embedding):
            return "embedding"
        if isinstance(module, _CONVOLUTIONS):
            return "convolution"
        if target.feature_slice is not None:
            return "slice"
        return "product" if _writes_product(type(self)) else "linear"

    @property
    def linear(self) -> bool:
        """Whether the target is linear in its input's features: no embedding, and no convolution."""
        return self.layer_kind in _LINEAR

    @property
    def embeds(self) -> bool:
        """Whether the target is an embedding."""
        return self.layer_kind == "embedding"

    @property
    def feature_slice(self) -> FeatureSlice | None:  # type: ignore[override]  # other kinds read it in each call
        """The features of a fused projection that are changed; None for all."""
        return self.view.feature_slice

    def factors(self) -> tuple[Float[Tensor, "*stack r d_in"], Float[Tensor, "*stack d_out r"]]:
        """Returns A and B. They may be computed from the parameters; gradients go through the computation."""
        raise NotImplementedError(f"{type(self).__name__} does not override factors()")

    def add_product(
        self, y: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"], scale: float
    ) -> Float[Tensor, "*batch d_out"]:
        """Returns y + `scale` B A x by another formula than with the factors: with fewer operations, or fewer bytes kept.

        It need not be written. It is used on linear layers without feature slices, where x and y have one dtype, and not under
        autocast. Of the options only the scale and dropout reach it: no `keep`, and no choice of tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override add_product()")

    @classmethod
    def patches_weight(cls, target: Target) -> bool:
        if target.weight_read is not None or target.parameter:
            return True
        # A subclass with its own forward may change the vectors of an embedding (Gemma scales them), or the input and the
        # weight of a convolution (BiT pads and standardises them). Adding to its output would be wrong; a weight patch is
        # right, because the subclass's own code runs with the new weight. A quantized weight cannot be added to, and the
        # forward of a quantized embedding only looks it up.
        quantized = isinstance(target.module, nn.Embedding) and is_quantized(target.module.weight)
        return has_own_forward(target.module) and not quantized

    @property
    def drops(self) -> bool:
        """Whether inputs are dropped in this call."""
        return bool(self.dropout) and self.training

    def whole_factors(self) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
        """Returns A, and B times the scaling, with zeros for the features outside of the feature slice."""
        a, b = self.factors()
        b = self.feature_slice.spread(b.mT).mT if self.feature_slice is not None else b
        return a, self.scaling * self.strength * b

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else hidden_input(args, kwargs)
        linear = self.layer_kind in _LINEAR
        if linear and type(output) is Tensor and _is_compiling():
            # Nothing is changed in place. Whatever is read here becomes a guard, and each call of the compiled code checks all
            # guards of all targets: 50 ns each. `__call__` reads six tables of hooks, of which four are for backward passes.
            hooked = torch.is_grad_enabled() or self._forward_pre_hooks or self._forward_hooks or hooked_everywhere()
            return self(x, output) if hooked else self.forward(x, output)
        if type(output) is not Tensor:
            # What is inside a tuple, or of another class, may be held by somebody else: no layer is named, so nothing is
            # changed in place.
            layer = None if linear else target
            return replace_hidden(output, self(hidden_input(args, kwargs), hidden_output(output), layer))
        if not linear:
            return self(x, output, target)
        layer, alone = fresh(target, self)
        # FSDP2 and accelerate load the parameters by hooks on this module, which only `__call__` runs.
        return self(x, output, layer, alone)

    def contribution(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        # Onto zeros: `after_call` may change y in place, and y plus the product minus y would round it.
        layer = None if self.linear else target
        product: Tensor = self(hidden_input(args, kwargs), torch.zeros_like(y), layer)
        return product

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        if self.linear and type(output) is Tensor and not self.drops:
            work = shared_work(self, target, batch)
            if work is not None:
                x = args[0] if args else hidden_input(args, kwargs)
                in_place = not (torch.is_grad_enabled() or must_copy()) and fresh(target, self)[0] is not None
                return add_per_example(self, work, target, x, output, batch, in_place=in_place)
        # Without shared work each delta module runs on its own examples, as other output maps do.
        batch.first.pop((target, self.training), None)
        return super().after_call_mixed(target, args, kwargs, output, batch)

    def forward(
        self,
        x: Shaped[Tensor, "*input"],
        y: Float[Tensor, "*output"],
        layer: nn.Module | None = None,
        alone: bool = False,
    ) -> Float[Tensor, "*output"]:
        """Returns y with the product added.

        Args:
            layer: the linear layer that computed y from x, if y may be changed in place; a convolution or embedding always.
            alone: whether y is exactly the layer's output, without other deltas.
        """
        return self.added(x, y, layer, alone, Product(self.scaling * self.strength, keep=self.keep))

    def added(
        self,
        x: Shaped[Tensor, "*input"],
        y: Float[Tensor, "*output"],
        layer: nn.Module | None,
        alone: bool,
        product: Product,
    ) -> Float[Tensor, "*output"]:
        """Returns what `forward` returns, for a product with other options."""
        kind = self.layer_kind
        if kind == "product" and self._takes_product(x, y):
            return self.add_product(y, self._dropped(x), product.scale)
        a, b = self.factors()
        if kind not in _LINEAR:
            return self._added_elsewhere(x, y, layer, product, (a, b))
        if self.dropout and self.training:
            # With dropout the input differs from the layer's, so one autograd node cannot serve both.
            x, alone = self._dropped(x), False
        if kind == "slice" and (part := self.view.feature_slice) is not None:
            # A contiguous slice is a view of the output. An interleaved one (GPT-NeoX: a group per head) is not, so B is
            # spread to all features with zeros between.
            if part.groups == 1:
                product = product._replace(start=part.start)
            else:
                b = part.spread(b.mT).mT
        return add_low_rank(y, x, a, b, product, layer, alone)

    def _added_elsewhere(
        self, x: Tensor, y: Tensor, layer: nn.Module | None, product: Product, factors: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Returns y with the product of a convolution or an embedding added."""
        a, b = factors
        if self.layer_kind == "convolution" and layer is not None:
            return convolved(y, self._dropped(x), a.unflatten(-1, self.view.kernel), b, product, layer)
        # A product with a one-hot vector is the row of A^T for that id.
        try:
            h = self._dropped(F.embedding(x, a.mT, padding_idx=getattr(layer, "padding_idx", None)))
        except IndexError as error:
            raise StateError(
                f"{self.word()} was attached to an embedding of {a.shape[1]} ids, and there are ids beyond: the embedding "
                "was resized (resize_token_embeddings?); detach() the delta and attach a new one"
            ) from error
        # A subclass that scales its vectors has a weight patch, except where the weight is quantized.
        scale = product.scale * getattr(layer, "embed_scale", 1.0)
        return y + (F.linear(h, b) * scale).to(y.dtype)

    def _takes_product(self, x: Tensor, y: Tensor) -> bool:
        # Autocast would cast y, too.
        return x.dtype is y.dtype and is_dense(x) and not torch._C._is_any_autocast_enabled()

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def update(self) -> Float[Tensor, "*stack d_out d_in"]:
        """Returns the update of the weight as a matrix, in float32 or wider."""
        a, b = self.factors()
        return self.scaling * wide(b) @ wide(a)

    def weight_updates(self, target: nn.Module) -> Mapping[str, Tensor]:
        return {self.view.name: self.view.stored(self.update())}


def _writes_product(kind: type[LowRank]) -> bool:
    """Returns whether a kind has an `add_product` for its own factors: a class that overrides only `factors` has not."""
    owner = next(one for one in kind.__mro__ if not {"factors", "add_product"}.isdisjoint(vars(one)))
    return owner is not LowRank and "add_product" in vars(owner)
