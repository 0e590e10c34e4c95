"""What `lm_eval` asks of a language model: numbers of a loop in float64, texts of the sampler, and,
where lm_eval is installed, those of its own class for transformers.

    python -m pytest -m slow -rP tests/test_lm_eval_adapter.py
"""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers_oracle as oracle
from flax import linen as nn

from jaxtrain.cli import main as run_command
from jaxtrain.data.text.plain_tokenizers import Bytes, Characters
from jaxtrain.errors import UserError
from jaxtrain.inference import sampling
from jaxtrain.inference.lm_eval_adapter import LanguageModel, adapter, rendered
from jaxtrain.models import MLP, Transformer
from jaxtrain.parallel import mesh as meshes
from jaxtrain.weights import loading

MODEL = Transformer(vocabulary=257, width=16, depth=1, heads=2, max_length=24)
LONG = "a text of more bytes than the model sees, which are twenty-four"
PAIRS = [
    ("To be", " or not"),
    ("", "To be"),
    ("trailing  ", "spaces"),
    (LONG, " cut"),
    ("é", "à"),
    ("  ", "x"),
]
PARAMS: Any = nn.meta.unbox(MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]


def asked(**settings: Any) -> LanguageModel:
    """A small random model of bytes."""
    return LanguageModel(MODEL, PARAMS, Bytes(), **({"batch_size": 4} | settings))


@jax.jit
def forward(tokens_BT: jax.Array) -> jax.Array:
    """The logits of the model."""
    return MODEL.apply({"params": PARAMS}, tokens_BT)


def logits_of(ids: list[int]) -> np.ndarray:
    """What the model says of each place of one text, in float64."""
    padded = jnp.array([[*ids, *[7] * (24 - len(ids))]], jnp.int32)
    return np.asarray(forward(padded), np.float64)[0, : len(ids)]


def by_hand(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The sum of log-softmax over the continuation, token by token."""
    ids = (context + continuation)[-25:]
    logits, total, greedy = logits_of(ids[:-1]), 0.0, True
    for place in range(len(ids) - len(continuation), len(ids)):
        row = logits[place - 1]
        total += row[ids[place]] - row.max() - np.log(np.exp(row - row.max()).sum())
        greedy &= bool(row.argmax() == ids[place])
    return total, greedy


def ids_of(text: str) -> list[int]:
    """Its bytes."""
    return list(text.encode())


def test_loglikelihoods_are_those_of_a_loop_in_float64(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = asked().loglikelihood(PAIRS)
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        kept = context.rstrip()
        before = ids_of(kept) or [256]
        wanted = by_hand(before, ids_of(context[len(kept) :] + continuation))
        assert total == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]
    assert "1 of 6 requests are longer than the 24 tokens" in capsys.readouterr().err


def test_what_greedy_sampling_says_is_greedy_and_nothing_else() -> None:
    [ids] = sampling.generate(MODEL, PARAMS, [ids_of("To be")], most=1, temperature=0)
    language = dataclasses.replace(asked(), tokenizer=Characters("".join(map(chr, range(257)))))
    right, wrong = chr(ids[0]), chr((ids[0] + 1) % 256)
    answers = language.loglikelihood([("To be", right), ("To be", wrong)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_larger_batches_and_a_mesh_change_no_answer() -> None:
    mesh = meshes.make("data:4,fsdp:2")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    spread = dataclasses.replace(asked(batch_size=8), params=jax.device_put(PARAMS, whole))
    found, wanted = spread.loglikelihood(PAIRS), asked().loglikelihood(PAIRS)
    np.testing.assert_allclose(np.array(found)[:, 0], np.array(wanted)[:, 0], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_a_rolling_likelihood_counts_each_token_once() -> None:
    done: list[tuple[int, float]] = []
    texts = [LONG, "short", ""]
    found = asked().loglikelihood_rolling(texts, lambda *each: done.append(each))
    ids, total = ids_of(LONG), 0.0
    assert 2 * 24 < len(ids) < 3 * 24
    for start in range(0, len(ids), 24):
        end = min(start + 24, len(ids))
        before = ids[end - 25 : start] if start else [256]
        total += by_hand(before, ids[start:end])[0]
    assert found == pytest.approx([total, by_hand([256], ids_of("short"))[0], 0.0], rel=1e-5)
    assert sorted(done) == [(0, found[0]), (1, found[1])]


def test_texts_are_those_of_the_sampler_up_to_the_first_stop_text() -> None:
    greedy = {"max_gen_toks": 12}
    [ids] = sampling.generate(MODEL, PARAMS, [ids_of("To be")], most=12, temperature=0)
    text = Bytes().decode(ids)
    stop = text[len(text) // 2]
    cut = ids_of(LONG)[-12:]
    [after_cut] = sampling.generate(MODEL, PARAMS, [cut], most=12, temperature=0)
    [drawn] = sampling.generate(
        MODEL, PARAMS, [ids_of("To be")], most=9, temperature=0.7, top_k=5, seed=3, rows=[3]
    )
    requests: list[tuple[str, dict[str, Any]]] = [
        ("To be", greedy),
        ("To be", greedy | {"until": [stop, "never"]}),
        (LONG, greedy | {"until": []}),
        ("To be", {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7, "top_k": 5}),
        ("To be", greedy | {"do_sample": False, "temperature": 0.7, "until": stop}),
        ("", {"max_tokens": 2}),
    ]
    found = asked(batch_size=2, seed=3).generate_until(requests)
    first = text.split(stop)[0]
    assert found[:2] == [text, first] and found[4] == first
    assert found[2] == Bytes().decode(after_cut) and found[3] == Bytes().decode(drawn)


def test_what_cannot_be_answered_is_said() -> None:
    language = asked()
    for given, message in (
        ({"num_beams": 4}, "num_beams is not what sampling here can do; valid: until, do_sample"),
        ({"do_sample": True}, "do_sample is true, but temperature is 0 or not given"),
        ({}, "max_gen_toks=256 must be at least 1 and less than the 24 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            language.generate_until([("a", given)])
    with pytest.raises(UserError, match="request 0: the continuation '' is 0 tokens"):
        language.loglikelihood([("a", "")])
    with pytest.raises(UserError, match="must be from 1 to the 24 that the model sees"):
        language.loglikelihood([("a", LONG)])
    with pytest.raises(UserError, match=r"max_length=25: must be from 0 \(all\) to the model's 24"):
        asked(max_length=25)
    with pytest.raises(UserError, match="batch_size=0: must be at least 1"):
        asked(batch_size=0)
    with pytest.raises(UserError, match="MLP: says no texts, which lm_eval asks for; give a Trans"):
        LanguageModel(MLP(), PARAMS, Bytes())
    with pytest.raises(UserError, match="neither BOS nor EOS to stand before a text"):
        LanguageModel(MODEL, PARAMS, Characters("ab")).loglikelihood([("", "ab")])
    small = MODEL.clone(vocabulary=60)
    with pytest.raises(UserError, match="token 97 is none of the model's 60; give the model's own"):
        LanguageModel(small, PARAMS, Bytes()).loglikelihood([("a", "b")])
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)
    with pytest.raises(UserError, match="request 0: the model's logits are nan"):
        LanguageModel(MODEL, broken, Bytes()).loglikelihood([("a", "b")])


def test_a_conversation_may_end_inside_its_last_message() -> None:
    pytest.importorskip("jinja2")
    template = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}[a]{% endif %}"

    @dataclasses.dataclass(frozen=True)
    class Chatty(Bytes):
        chat_template: str | None = template

    told = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    assert rendered(Chatty(), told[:1], True) == "[u]Hi;[a]"
    assert rendered(Chatty(), told, False) == "[u]Hi;[a]Well,"
    with pytest.raises(UserError, match="tokenizer 'bytes': has no chat template; ask without one"):
        rendered(Bytes(), told, True)
    # the template's own words behind the message are those of the message
    chatml = "{% for m in messages %}<|im_start|>{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    told[1]["content"] = " end "
    assert rendered(Chatty(chat_template=chatml), told, False).endswith("<|im_start|>end")
    for other in (
        "{{ messages[0].content }}",
        "{{ messages[1].content | upper }}",
        "{{ messages[1].content[:-1] }}",
        "{{ messages[1].content }}{{ messages[1].content }}",
    ):
        with pytest.raises(
            UserError, match="does not write the last message as it is, so nothing can"
        ):
            rendered(Chatty(chat_template=other), told, False)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed here"
)
def test_without_lm_eval_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = r"needs lm_eval; pip install 'jaxtrain\[lm_eval\]'"
    with pytest.raises(UserError, match=line):
        adapter(MODEL, PARAMS, Bytes())
    assert run_command(["lm_eval", str(tmp_path), "--tasks=x"]) == 2
    assert re.search(line, capsys.readouterr().err)


# --- with lm_eval
# --------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX.!,? \n"[: oracle.VOCABULARY - 3]
"""Two fewer than the model has tokens, as tables of real models are padded."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the libraries keep; the test is skipped without them."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(folder))
        pytest.importorskip("lm_eval", reason="lm_eval is not installed here")
        pytest.importorskip("datasets", reason="datasets is not installed here")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: Any, home: Path) -> Path:
    """The folder of a tiny random Llama of transformers, whose tokenizer puts BOS first or not."""
    pytest.importorskip("torch", reason="torch is not installed here")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
    tokenizers = pytest.importorskip("tokenizers")
    folder: Path = tmp_path_factory.mktemp("llama")
    oracle.theirs("llama").save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    if request.param:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def instances(kind: str, requests: list[Any]) -> list[Any]:
    """Requests as lm_eval passes them."""
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=request, idx=index)
        for index, request in enumerate(requests)
    ]


def ours_of(folder: Path) -> Any:
    """Our model of a folder, as lm_eval takes it."""
    from jaxtrain.data.text.tokenizers import open_tokenizer

    model, params, tokenizer = loading.load(folder)
    return adapter(model, params, open_tokenizer(str(tokenizer)), batch_size=3)


def theirs_of(folder: Path) -> Any:
    """lm_eval's own class for the same."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), batch_size=3, dtype="float32", device="cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_answers_are_those_of_lm_evals_own_class(llama: Path) -> None:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list(LETTERS), size)) for size in (5, 40, 160, 161, 200, 390)]
    pairs = [(text, end) for text in texts for end in ("a", " bc", "Not at all.")]
    pairs += [("", texts[0]), ("<s>ab", "c"), ("ab \n", "c")]
    ours, theirs = ours_of(llama), theirs_of(llama)
    pairs += [(text, letter) for text in texts[:2] for letter in LETTERS]
    mine = ours.loglikelihood(instances("loglikelihood", pairs))
    wanted = theirs.loglikelihood(instances("loglikelihood", pairs))
    np.testing.assert_allclose(
        [total for total, _ in mine], [total for total, _ in wanted], rtol=0, atol=1e-4
    )
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in wanted]
    assert any(greedy for _, greedy in mine)
    rolling = [instances("loglikelihood_rolling", [(text,) for text in texts])] * 2
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(rolling[0]),
        theirs.loglikelihood_rolling(rolling[1]),
        rtol=0,
        atol=1e-3,  # a sum of 390
    )
    told: list[dict[str, Any]] = [
        {"until": ["\n", "e"], "max_gen_toks": 24},
        {"until": "ab", "do_sample": False, "max_gen_toks": 30},
        {"until": ["</s>"], "max_gen_toks": 20},
    ]
    requests = [(text, each) for text in texts for each in told]
    generated = ours.generate_until(instances("generate_until", requests))
    assert generated == theirs.generate_until(instances("generate_until", requests))
    assert len({*generated}) > 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_windows_are_those_of_lm_evals_utils(home: Path) -> None:
    from lm_eval import utils

    from jaxtrain.inference import lm_eval_adapter

    for length in (1, 2, 5, 8):
        for size in range(20):
            ids = list(range(size))
            wanted = utils.get_rolling_token_windows(ids, 99, length, 1)
            found = lm_eval_adapter._windows(0, ids, 99, length)
            assert [(pair.context, pair.continuation) for pair in found] == [
                utils.make_disjoint_window(pair) for pair in wanted
            ]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: ["a", " b", "no"]\ndoc_to_target: label\n'
    "metric_list:\n  - metric: acc\n",
    "loglikelihood_rolling": 'doc_to_target: "{{question}}"\nmetric_list:\n'
    "  - metric: byte_perplexity\n",
    "generate_until": 'doc_to_target: answer\ngeneration_kwargs:\n  until: ["\\n"]\n'
    "  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_local_task_runs_offline_and_gives_what_their_class_gives(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [
        {"question": f"is {word}?", "label": index % 3, "answer": word}
        for index, word in enumerate(["this", "that", "it", "all", "none", "some"])
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, rest in KINDS.items():
        task = TASK.format(name=f"local_{kind}", data=data, kind=kind) + rest
        (tmp_path / f"{kind}.yaml").write_text(task)
    names = [f"local_{kind}" for kind in KINDS]
    arguments = [f"--tasks={','.join(names)}", f"--include_path={tmp_path}", "--batch_size=3"]
    out = tmp_path / "results.json"
    assert run_command(["lm_eval", str(llama), *arguments, f"--out={out}", "--limit=5"]) == 0
    assert all(name in capsys.readouterr().out for name in names[:1])
    found = json.loads(out.read_text())["results"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wanted = lm_eval.simple_evaluate(
        theirs_of(llama), tasks=names, task_manager=manager, limit=5, bootstrap_iters=0
    )["results"]
    for name in names:
        for metric, value in wanted[name].items():
            if metric.endswith(",none") and "stderr" not in metric:
                assert found[name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
