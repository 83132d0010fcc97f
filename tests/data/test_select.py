"""Every candidate is kept or dropped for one reason, and no question is in both parts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.data.records import RolloutRow, write_rows
from pipo.data.rollout_settings import meta_path
from pipo.data.select import SelectReport, SelectSettings, select_opd, select_sft
from pipo.errors import ConfigError, DataError


def rollout(index, texts=("a", "b"), dataset="sums", prompt=None, metadata=None, **lists):
    item = {
        "dataset": dataset,
        "prompt": prompt or f"{dataset} {index}?",
        "micro_index": index,
        "metadata": metadata or {},
    }
    count = len(texts)
    row = {"accuracies": [1] * count, "finished": [True] * count, "n_tokens": [len(text) for text in texts], **lists}
    return RolloutRow.model_validate({"question_idx": index, "src_item": item, "completion_texts": list(texts), **row})


def select(tmp_path, rows, part="sft", **chosen):
    path = tmp_path / "r.jsonl"
    write_rows(path, rows)
    return select_files([path], part, **chosen)


def select_files(paths, part="sft", **chosen):
    report = SelectReport(part)
    choose = select_sft if part == "sft" else select_opd
    kept = list(choose(paths, SelectSettings(**{"sft_share": 1.0 if part == "sft" else 0.0, **chosen}), report))
    assert report.num_kept == len(kept)
    assert report.num_kept + sum(report.dropped.values()) == report.num_candidates
    return kept, report


def answers(rows):
    return [row.messages[-1]["content"] for row in rows]


def test_an_sft_row_is_the_specifications(tmp_path):
    (row, _), report = select(tmp_path, [rollout(4, ("<think>\na</think>b", "c"))])
    assert json.loads(row.to_line()) == {
        "messages": [{"role": "user", "content": "sums 4?"}, {"role": "assistant", "content": "<think>\na</think>b"}],
        "source": "sums",
        "source_index": 4,
    }
    assert (report.num_rows, report.num_candidates, report.num_tokens) == (1, 2, 19)


def test_an_opd_row_is_the_specifications_with_what_checks_it(tmp_path):
    row = rollout(4)
    item = row.src_item.model_copy(update={"final_answer": "4", "grader": "math", "metadata": {"a": 1}})
    (opd,), _ = select(tmp_path, [row.model_copy(update={"src_item": item})], "opd")
    expected = {"messages": [{"role": "user", "content": "sums 4?"}], "source": "sums", "source_index": 4}
    assert json.loads(opd.to_line()) == {**expected, "final_answer": "4", "grader": "math", "metadata": {"a": 1}}


@pytest.mark.parametrize(
    ("lists", "chosen", "reason"),
    [
        ({"accuracies": [0.0]}, {}, "wrong"),
        ({"accuracies": [None]}, {}, "not graded"),
        ({"accuracies": []}, {}, "not graded"),
        ({"finished": [False]}, {}, "not finished"),
        ({"finished": []}, {}, "not known whether finished"),
        ({"n_tokens": [9]}, {"max_tokens": 8}, "longer than max_tokens"),
        ({"n_tokens": [9]}, {"min_tokens": 10}, "shorter than min_tokens"),
        ({"n_tokens": []}, {"max_tokens": 8}, "length not known"),
        ({"texts": [" "]}, {}, "empty or failed"),
        ({"accuracies": [0.0]}, {"min_accuracy": 0.5}, "teacher's accuracy below min_accuracy"),
        ({}, {"max_accuracy": 0.5}, "teacher's accuracy above max_accuracy"),
        ({"accuracies": [None]}, {"min_accuracy": 0.5}, "teacher's accuracy unknown"),
        ({"accuracies": []}, {"max_accuracy": 0.5}, "teacher's accuracy unknown"),
        ({}, {"sft_share": 0.0}, "question is for OPD"),
    ],
)
def test_each_reason(tmp_path, lists, chosen, reason):
    kept, report = select(tmp_path, [rollout(0, **{"texts": ["a"], **lists})], **chosen)
    assert kept == []
    assert report.dropped == {reason: 1}


def test_wrong_and_unfinished_samples_stay_where_that_is_asked_for(tmp_path):
    rows = [rollout(0, accuracies=[0, 0], finished=[False, True])]
    assert len(select(tmp_path, rows, incorrect=True, unfinished=True)[0]) == 2


def test_unknown_grades_decide_nothing_that_known_ones_decide_already(tmp_path):
    rows = [rollout(0, "abcd", accuracies=[1, 1, None, 0])]
    assert len(select(tmp_path, rows, "opd", min_accuracy=0.5)[0]) == 1
    assert select(tmp_path, rows, "opd", min_accuracy=0.75)[1].dropped == {"teacher's accuracy unknown": 1}
    assert select(tmp_path, rows, "opd", min_accuracy=0.8)[1].dropped == {"teacher's accuracy below min_accuracy": 1}


def test_the_shortest_or_the_first_so_many(tmp_path):
    rows = [rollout(0, ("aaa", "a", "aa", "aaaa"), accuracies=[1, 0, 1, 1])]
    assert answers(select(tmp_path, rows, keep="shortest")[0]) == ["aa"]
    assert answers(select(tmp_path, rows, keep="shortest", max_per_question=2)[0]) == ["aaa", "aa"]
    kept, report = select(tmp_path, rows, max_per_question=2)
    assert answers(kept) == ["aaa", "aa"]
    assert report.dropped == {"wrong": 1, "more than max_per_question": 1}
    with pytest.raises(DataError, match="no n_tokens"):
        select(tmp_path, [rollout(0, n_tokens=[])], keep="shortest")


def test_what_was_there_before_is_left_out(tmp_path):
    rows = [rollout(0, ("a", "a", "b")), rollout(1, ("c", "d"), prompt="sums 0?"), rollout(2, ("a", "e"))]
    kept, report = select(tmp_path, rows)
    assert answers(kept) == ["a", "b", "a", "e"]
    assert report.dropped == {"repeated completion": 1, "repeated question": 2}
    assert len(select(tmp_path, rows, repeated=True)[0]) == 7
    assert select(tmp_path, rows, "opd")[1].dropped == {"repeated question": 1}


def test_a_thinking_prefix_is_added_once(tmp_path):
    kept, _ = select(tmp_path, [rollout(0, ("a</think>b", "<think>\nc</think>d"))], thinking_prefix="<think>\n")
    assert answers(kept) == ["<think>\na</think>b", "<think>\nc</think>d"]


def test_the_first_questions_are_for_sft_and_the_last_for_opd(tmp_path):
    order = [7, 3, 9, 0, 1, 8, 2, 4, 6, 5]
    rows = [rollout(index) for index in order] + [rollout(index, dataset="words") for index in order]
    sft, _ = select(tmp_path, rows, sft_share=0.9)
    opd, _ = select(tmp_path, rows, "opd", sft_share=0.9)
    assert {(row.source, row.source_index) for row in opd} == {("sums", 9), ("words", 9)}
    assert len({(row.source, row.source_index) for row in sft}) == 18


def test_a_file_that_is_not_complete_is_split_as_the_complete_one(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rows(path, [rollout(index) for index in (0, 1, 88, 90, 91)])
    assert [row.source_index for row in select_files([path], "opd", sft_share=0.9)[0]] == [91]
    meta_path(path).write_text(json.dumps({"num_questions": 1000}))
    assert select_files([path], "opd", sft_share=0.9)[0] == []


def test_a_problem_asked_in_two_languages_is_in_one_part(tmp_path):
    rows = [rollout(index, metadata={"problem_id": f"p{index // 2}"}) for index in range(10)]
    sft, _ = select(tmp_path, rows, sft_share=0.5)
    opd, _ = select(tmp_path, rows, "opd", sft_share=0.5)
    assert {row.source_index // 2 for row in sft} & {row.source_index // 2 for row in opd} == set()
    assert {row.source_index for row in sft} | {row.source_index for row in opd} == set(range(10))


def test_what_belongs_together_by_way_of_another_question_is_in_one_part(tmp_path):
    rows = [rollout(index) for index in range(10)]
    rows[8] = rollout(8, prompt="same?", metadata={"problem_id": "p"})  # a problem that is asked twice
    rows[1] = rollout(1, prompt="same?")  # as one of these, in words
    rows[9] = rollout(9, metadata={"problem_id": "p"})
    for seed in (None, *range(8)):
        sft, _ = select(tmp_path, rows, sft_share=0.5, split_seed=seed, repeated=True)
        opd, _ = select(tmp_path, rows, "opd", sft_share=0.5, split_seed=seed, repeated=True)
        parts = [{row.source_index for row in part} & {1, 8, 9} for part in (sft, opd)]
        assert sorted(map(len, parts)) == [0, 3]


def test_the_split_does_not_hang_on_the_order_of_files(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, [rollout(index, dataset="a", prompt=f"{index}?") for index in range(10)])
    write_rows(second, [rollout(9 - index, dataset="b", prompt=f"{index}?") for index in range(10)])
    sft, _ = select_files([first, second], sft_share=0.5)
    opd, _ = select_files([second, first], "opd", sft_share=0.5)
    assert {row.messages[0]["content"] for row in sft} & {row.messages[0]["content"] for row in opd} == set()


def test_two_teachers_answers_to_one_question_are_not_repeated(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_rows(paths[0], [rollout(0, ("a", "b")), rollout(1)])
    write_rows(paths[1], [rollout(0, ("b", "c")), rollout(1, ("d", "e"), prompt="sums 0?")])
    kept, report = select_files(paths)
    assert answers(kept) == ["a", "b", "a", "b", "c"]
    assert report.dropped == {"repeated completion": 1, "repeated question": 2}
    assert [row.source_index for row in select_files(paths, "opd")[0]] == [0, 1]


def test_a_choice_of_a_datasets_questions_is_split_by_their_number(tmp_path):
    path = tmp_path / "r.jsonl"
    write_rows(path, [rollout(index) for index in range(900, 910)])
    meta_path(path).write_text(json.dumps({"num_questions": 10}))
    assert len(select_files([path], sft_share=0.9)[0]) == 18
    assert [row.source_index for row in select_files([path], "opd", sft_share=0.9)[0]] == [909]


samples = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "b", "cc"]), st.sampled_from([0.0, 1.0, None]), st.booleans(), st.integers(0, 9)
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.tuples(st.sampled_from(["x", "y"]), st.integers(0, 5), samples), max_size=12),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    seed=st.sampled_from([None, 1]),
    chosen=st.fixed_dictionaries(
        {},
        optional={
            "keep": st.sampled_from(["all", "shortest"]),
            "max_per_question": st.integers(1, 3),
            "min_accuracy": st.sampled_from([0.0, 0.5, 1.0]),
            "max_tokens": st.integers(1, 9),
            "repeated": st.booleans(),
            "incorrect": st.booleans(),
            "unfinished": st.booleans(),
        },
    ),
)
def test_counts_add_up_and_no_question_is_in_both_parts(tmp_path_factory, data, share, seed, chosen):
    folder = tmp_path_factory.mktemp("select")
    rows = [
        rollout(
            index,
            [text for text, *_ in drawn],
            dataset,
            accuracies=[accuracy for _, accuracy, *_ in drawn],
            finished=[done for *_, done, _ in drawn],
            n_tokens=[count for *_, count in drawn],
        )
        for dataset, index, drawn in data
    ]
    shared = {"sft_share": share, "split_seed": seed}
    sft, report = select(folder, rows, **shared, **chosen)  # which checks the sums
    assert report.num_candidates == sum(row.num_samples for row in rows)
    opd, report = select(folder, rows, "opd", **shared, repeated=chosen.get("repeated", False))
    assert report.num_candidates == len(rows)
    assert {(row.source, row.source_index) for row in sft} & {(row.source, row.source_index) for row in opd} == set()


def test_bad_rows_stop_it_or_are_reported(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(rollout(0).to_line() + "\n{}\n" + rollout(1).to_line() + "\n")
    with pytest.raises(DataError, match=r"1 of 3 rows are no RolloutRow: line 2"):
        select_files([path])
    kept, report = select_files([path], skip_bad_rows=True)
    assert len(kept) == 4
    assert [bad["line"] for bad in report.as_dict()["bad"][str(path)]] == [2]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"sft_share": 1.5}, "sft_share"),
        ({"min_accuracy": -1}, "min_accuracy"),
        ({"max_per_question": 0}, "max_per_question"),
        ({"keep": "longest"}, "keep"),
    ],
)
def test_settings_are_checked(tmp_path, chosen, told):
    with pytest.raises(ConfigError, match=told):
        select(tmp_path, [rollout(0)], **chosen)
