"""`rank_list_for_transform` and `merge_sliced_parameter`: results and refusals as recorded from MindSpore."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parckpt import Layout, Strategy, TensorStrategy, merge_sliced_parameter, rank_list_for_transform
from parckpt.errors import ConfigError, ConfigKeyError, ConfigTypeError, FormatError, LayoutError
from parckpt.formats import strategy as form
from parckpt.testing.filesystem import MemoryFileSystem

pytestmark = pytest.mark.fast

FOUR = {
    "w": TensorStrategy((2, 2), (0, -1)),
    "b": TensorStrategy((2, 2), (-1,)),
    "v": TensorStrategy((2, 2), (1, 0)),
    "o": TensorStrategy((2, 2), (0, -1), opt_weight_shard_step=2, opt_weight_shard_size=2),
}
TWO = {name: TensorStrategy((2,), {"w": (-1, 0), "b": (-1,)}.get(name, (0, -1))) for name in FOUR}
STAGES = {f"{stage}-{name}": TWO[name] for stage, names in enumerate(("wb", "vo")) for name in names}


class TestRanks:
    def test_the_recorded_lists(self) -> None:
        assert [rank_list_for_transform(r, FOUR, TWO) for r in (0, 1)] == [[3, 2, 1, 0]] * 2
        assert [rank_list_for_transform(r, FOUR, FOUR) for r in range(4)] == [[0], [1], [2], [3]]
        assert rank_list_for_transform(0, FOUR) == [3, 2, 1, 0]
        assert rank_list_for_transform(1, None, TWO) == [0]

    def test_pipeline_stages(self) -> None:
        assert rank_list_for_transform(0, Strategy(STAGES), TWO) == [2, 0]
        assert rank_list_for_transform(1, Strategy(STAGES), None) == [3, 2, 1, 0]
        assert rank_list_for_transform(3, FOUR, Strategy(STAGES)) == [3, 2, 1, 0]
        assert rank_list_for_transform(2, Strategy(STAGES), Strategy(STAGES)) == [2]

    def test_strategies_come_from_files(self) -> None:
        fs = MemoryFileSystem()
        for path, data in (("/s.ckpt", form.encode(Strategy(FOUR))), ("/empty", b""), ("/junk", b"\xff" * 8)):
            with_file(fs, path, data)
        assert rank_list_for_transform(0, "/s.ckpt", filesystem=fs) == [3, 2, 1, 0]
        with pytest.raises(ConfigError, match="no strategy file /none"):
            rank_list_for_transform(0, "/none", filesystem=fs)
        for path in ("/empty", "/junk"):
            with pytest.raises(FormatError, match=path):
                rank_list_for_transform(0, path, filesystem=fs)

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            (("0", FOUR), ConfigTypeError, "rank_id must be an int, not str"),
            ((0, 5), ConfigTypeError, "src_strategy_file must be"),
            ((0, FOUR, 5), ConfigTypeError, "dst_strategy_file must be"),
            ((0, {}), ConfigError, "names no tensors"),
            ((2, FOUR, TWO), LayoutError, "no rank 2 among the 2"),
            ((0, {"w": TensorStrategy((3,), (0,))}, {"w": TensorStrategy((2,), (0,))}), LayoutError, "3 ranks"),
            ((0, {"w": "no"}), ConfigError, "strategy of 'w'"),
        ],
    )
    def test_refusals(self, arguments: Any, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            rank_list_for_transform(*arguments)


def with_file(fs: MemoryFileSystem, path: str, data: bytes) -> None:
    from parckpt.storage.atomic import write_file

    write_file(fs, path, data)


FULL = np.arange(96, dtype=np.float32).reshape(8, 12)


def slices_of(tensor: TensorStrategy, full: Any = FULL) -> list[Any]:
    layout = tensor.layout()
    boxes = [layout.box(full.shape, rank) for rank in range(layout.nranks)]
    return [full[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.shape, strict=True))].copy() for box in boxes]


class TestMerge:
    def test_without_a_strategy_slices_follow_each_other(self) -> None:
        merged = merge_sliced_parameter([FULL[:3], FULL[3:]])
        np.testing.assert_array_equal(merged, FULL)

    @pytest.mark.parametrize(
        "tensor",
        [
            TensorStrategy((2, 2), (1, 0)),
            TensorStrategy((2, 2), (0, 1)),
            TensorStrategy((4,), (-1, 0)),
            TensorStrategy((2, 2), (-1, 0)),
            TensorStrategy((2, 2), ((0, 1), -1)),
            TensorStrategy((2, 2), (0, -1), opt_weight_shard_step=2, opt_weight_shard_size=-1),
        ],
    )
    def test_slices_of_a_layout(self, tensor: TensorStrategy) -> None:
        merged = merge_sliced_parameter(slices_of(tensor), {"w": tensor})
        np.testing.assert_array_equal(merged, FULL)
        assert not np.shares_memory(merged, FULL)

    def test_other_forms_of_a_strategy(self) -> None:
        slices = slices_of(TensorStrategy((2, 2), (1, 0)))
        message = SimpleNamespace(
            dev_matrix=[SimpleNamespace(dim=[2, 2])],
            tensor_map=[SimpleNamespace(dim=[1, 0])],
            param_split_shape=[SimpleNamespace(dim=[])],
            field=0,
            opt_weight_shard_step=0,
            opt_weight_shard_size=0,
        )
        for given_form in (Layout((2, 2), None, (1, 0)), [[2, 2], [1, 0], [], 0], message):
            np.testing.assert_array_equal(merge_sliced_parameter(slices, {"w": given_form}), FULL)
        np.testing.assert_array_equal(
            merge_sliced_parameter(slices, Strategy({"w": TensorStrategy((2, 2), (1, 0)), "x": FOUR["b"]}), name="w"),
            FULL,
        )

    def test_uneven_lengths(self) -> None:
        tensor = TensorStrategy((2,), (0, -1), param_split_shape=(5, 3))
        np.testing.assert_array_equal(merge_sliced_parameter([FULL[:5], FULL[5:]], {"w": tensor}), FULL)
        with pytest.raises(ConfigError, match="rank 0 should have 5 rows, but has 4"):
            merge_sliced_parameter([FULL[:4], FULL[4:]], {"w": tensor})

    def test_fields_of_an_embedding(self) -> None:
        """Recorded: two fields of two rows on each of two devices."""
        tensor = TensorStrategy((2,), (0, -1), field=2)
        slices = [np.arange(8.0).reshape(4, 2), np.arange(8.0, 16.0).reshape(4, 2)]
        merged = merge_sliced_parameter(slices, {"w": tensor})
        assert merged.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11], [4, 5], [6, 7], [12, 13], [14, 15]]

    def test_named_parameters(self) -> None:
        slices = [SimpleNamespace(name="v", asnumpy=lambda a=a: a) for a in slices_of(FOUR["v"])]
        np.testing.assert_array_equal(merge_sliced_parameter(slices, FOUR), FULL)
        slices[1].name = "x"
        with pytest.raises(ConfigError, match="different tensors"):
            merge_sliced_parameter(slices, FOUR)

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            (((FULL,),), ConfigTypeError, "must be a list, not tuple"),
            (([],), ConfigError, "must not be empty"),
            (([FULL], [1]), ConfigTypeError, "strategy must be a mapping"),
            (([1],), ConfigTypeError, "not int at index 0"),
            (([FULL, FULL[:, 1:]],), ConfigError, "slice 1"),
            (([FULL, FULL[0]],), ConfigError, "slice 1"),
            (([FULL, FULL.astype(int)],), ConfigError, "slice 1"),
            (([FULL], FOUR), ConfigKeyError, "does not know"),
            (([FULL], {"w": FOUR["w"]}), ConfigError, "for 4 devices, but there are 1"),
            (([FULL[:3], FULL[3:]], {"w": TensorStrategy((2,), (0,))}), ConfigError, "differ in shape"),
            (([FULL, FULL + 1], {"w": TensorStrategy((2,), (-1,))}), LayoutError, "ranks 0 and 1 hold the same"),
            (([FULL, FULL], {"w": TensorStrategy((2,), (-1, -1, 0))}), ConfigError, "cuts 3 dimensions"),
        ],
    )
    def test_refusals(self, arguments: Any, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            merge_sliced_parameter(*arguments)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (TensorStrategy((2, 2), (5, -1)), "axis 5 from the right does not exist"),
        (TensorStrategy((2, 2), (5, -1), opt_weight_shard_step=1, opt_weight_shard_size=-1), "does not exist"),
        (TensorStrategy((2, 2), (0, 0)), "uses a mesh axis twice"),
        (TensorStrategy((1 << 31, 1 << 31), (1, 0)), "ranks is more than"),
    ],
)
def test_impossible_strategies_are_refused_before_anything_is_counted(tensor: TensorStrategy, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        rank_list_for_transform(0, Strategy({"w": tensor}))
    with pytest.raises(LayoutError, match=said):
        merge_sliced_parameter([np.zeros((2, 2))] * 4, {"w": tensor})
