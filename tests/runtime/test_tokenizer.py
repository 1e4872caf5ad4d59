"""The tokenizer and the chat template give what transformers' AutoTokenizer gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llmc.runtime import worker
from llmc.runtime.engine import Engine
from llmc.runtime.errors import BundleError, RequestError
from llmc.runtime.text_encoder import TextEncoder, is_bounded
from llmc.runtime.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[3] / "shared" / "checkpoints" / "stories260K"
CORPUS = ["Once upon a time there was a user who asked an assistant about the system."] * 3
TEXTS = [
    "Once upon a time",
    "  two leading spaces, and\n\n\ttabs ",
    "naïve 日本 🙂 e\u0301",
    "",
    "<s> [INST] who</s>",
    "<|im_start|>user",
]

CHATML = """
{%- for message in messages %}
    {%- if message.role == 'tool' and not loop.first %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3 = """
{{- bos_token }}
{%- set today = strftime_now('%d %b %Y') %}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {%- set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {{- header }}{% generation %}{{ message['content'] | trim }}{% endgeneration %}{{ '<|eot_id|>' }}
{% endfor %}
Today is {{ today }}, {{ ns.count }} messages.
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{% endif %}
"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""
#: The constructs of gpt-oss's harmony format: macros that call each other and themselves, channels, the calls
#: of tools and their results, and a system message that the template writes.
HARMONY = """
{%- macro type_of(spec, level=0, optional=false) -%}
    {%- if spec.enum is defined and spec.enum -%}
        {%- for item in spec.enum -%}
            {{- '"' ~ item ~ '"' }}{%- if not loop.last %} | {% endif -%}
        {%- endfor -%}
    {%- elif spec.type is string and spec.type == 'array' -%}
        {{- type_of(spec['items'], level + 1) ~ '[]' -}}
    {%- elif spec.type == 'object' and spec.properties -%}
        {{- '{' }}
        {%- for key, value in spec.properties.items() -%}
            {{- key + (': ' if key in (spec.required or []) else '?: ') + type_of(value, level=level + 1) -}}
            {%- if not loop.last -%}, {% endif -%}
        {%- endfor -%}
        {{- '}' }}
    {%- elif spec.type is iterable and spec.type is not string -%}
        {{- spec.type | join(' | ') -}}
    {%- else -%}
        {{- spec.type | default('any') -}}
    {%- endif -%}
    {%- if optional and level == 0 %} | null{% endif -%}
{%- endmacro -%}
{%- macro tools_of(namespace_name, functions) -%}
    {{- '## ' + namespace_name + '\n\n' }}
    {%- for each in functions -%}
        {%- set function = each.function -%}
        {{- '// ' + function.description | trim + '\n' if function.description else '' }}
        {{- 'type ' + function.name + ' = (_: ' + type_of(function.parameters) + ') => any;\n' }}
    {%- endfor -%}
{%- endmacro -%}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
{{- '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '\nEffort: ' + reasoning_effort + '\n' }}
{%- if builtin_tools is defined and 'python' in builtin_tools %}{{- 'python\n' }}{%- endif -%}
{{- '<|end|>' }}
{%- if messages[0].role == 'developer' or messages[0].role == 'system' %}
    {%- set developer = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if developer or tools %}
    {{- '<|start|>developer<|message|>' + developer }}
    {%- if tools %}{{- tools_of('functions', tools) }}{%- endif %}
    {{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if 'thinking' in message and '<|channel|>' in message.thinking %}
            {{- raise_exception('the reasoning holds a channel') }}
        {%- endif %}
        {%- if message.tool_calls is defined and message.tool_calls %}
            {%- set first = message.tool_calls[0] %}
            {%- set call = first.function if first.function else first %}
            {%- if message.thinking and not loop.last %}
                {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
            {%- endif %}
            {{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
            {{- call.arguments | tojson + '<|call|>' }}
            {%- set last.name = call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
        {%- else %}
            {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
            {%- set last.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last.name is none %}{{- raise_exception('a result without a call') }}{%- endif %}
        {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content | tojson + '<|end|>' }}
    {%- elif message.role == 'user' -%}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "harmony": HARMONY}

#: The library takes a prefix longer than a token from its merges.
PANICS_AT_LOAD = json.dumps(
    {
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "long prefix",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
        },
    }
)

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": " What is <b>5 & 'six'</b>? "},
    {"role": "assistant", "content": "Eleven.", "tool_calls": None},
    {"role": "user", "content": "日本 🙂"},
]


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def save(directory: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def auto_tokenizer(directory: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(str(directory))


def assert_same(directory: Path, texts: list[str] = TEXTS) -> None:
    ours, theirs = Tokenizer.load(directory), auto_tokenizer(directory)
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
def test_encoding_equals_that_of_auto_tokenizer(make: Any, bos: bool, tmp_path: Path) -> None:
    tokenizer = with_bos(make()) if bos else make()
    assert_same(save(tmp_path, tokenizer, add_bos_token=not bos))  # tokenizer.json has the last word
    assert (Tokenizer.load(tmp_path).encode("a")[0] == tokenizer.token_to_id("<s>")) == bos


def test_tokens_that_only_the_configuration_names_are_added(tmp_path: Path) -> None:
    listed = {"content": "<|extra|>", "lstrip": False, "rstrip": True, "single_word": False, "special": True}
    word = {**listed, "content": "upon a", "normalized": True, "special": False, "rstrip": False}
    directory = save(
        tmp_path,
        byte_level(),
        added_tokens_decoder={"330": {**listed, "normalized": False}, "329": word},
        pad_token="<pad>",
        image_token="<image>",
        additional_special_tokens=["<|tool|>"],
    )
    assert_same(directory, [*TEXTS, "a<|extra|> b<pad><image><|tool|>Once upon a time"])


def test_named_tokens_come_from_the_older_file_when_the_configuration_has_no_list(tmp_path: Path) -> None:
    directory = save(tmp_path, byte_level(), bos_token=None, eos_token="<wrong>")
    bos = {
        "content": "<|im_start|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
    older = {"bos_token": bos, "eos_token": "</s>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(older))
    assert_same(directory)
    assert Tokenizer.load(directory).special_tokens == {"bos_token": "<|im_start|>", "eos_token": "</s>"}


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    directory = save(tmp_path, tokenizer)
    ours, theirs = Tokenizer.load(directory), auto_tokenizer(directory)
    assert [ours.encode(text) for text in TEXTS] == theirs(TEXTS)["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_text_equals_that_of_auto_tokenizer(template: str, prompt: bool, tmp_path: Path) -> None:
    directory = save(tmp_path, with_bos(byte_level()), chat_template=TEMPLATES[template])
    ours = Tokenizer.load(directory).apply_chat_template(CHAT, add_generation_prompt=prompt)
    theirs = auto_tokenizer(directory)
    assert ours == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    assert (
        Tokenizer.load(directory).encode_chat(CHAT, add_generation_prompt=prompt)
        == (theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"])
    )


def test_tools_and_other_variables_reach_the_template_as_in_transformers(tmp_path: Path) -> None:
    directory = save(tmp_path, byte_level(), chat_template=CHATML)
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"type": "object"}}}]
    variables = {"tools": tools, "enable_thinking": False}
    chat = [*CHAT, {"role": "tool", "content": "left out"}, {"role": "user", "content": "and <on>"}]
    ours = Tokenizer.load(directory).apply_chat_template(chat, **variables)
    theirs = auto_tokenizer(directory).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **variables
    )
    assert ours == theirs
    assert "größe" in ours
    assert "left out" not in ours


def test_channels_and_the_calls_of_tools_are_rendered_as_in_transformers(tmp_path: Path) -> None:
    directory = save(tmp_path, byte_level(), chat_template=HARMONY)
    unit = {"type": "string", "enum": ["°C", "°F"]}
    properties = {
        "place": {"type": "object", "properties": {"at": {"type": "array", "items": {"type": "number"}}}},
        "unit": unit,
        "days": {"type": ["integer", "null"]},
    }
    parameters = {"type": "object", "properties": properties, "required": ["place"]}
    function = {"name": "weather", "description": " Look it up. ", "parameters": parameters}
    variables: dict[str, Any] = {
        "tools": [{"type": "function", "function": function}],
        "reasoning_effort": "high",
        "builtin_tools": ["python"],
    }
    call = {"type": "function", "function": {"name": "weather", "arguments": {"unit": "°C"}}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "thinking": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": {"rain": True}},
    ]
    ours = Tokenizer.load(directory).apply_chat_template(chat, **variables)
    theirs = auto_tokenizer(directory).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **variables
    )
    assert ours == theirs
    assert 'type weather = (_: {place: {at?: number[]}, unit?: "°C" | "°F", days?: integer | null})' in ours
    assert "<|channel|>analysis<|message|>I look.<|end|>" in ours
    assert '<|channel|>commentary json<|message|>{"unit": "°C"}<|call|>' in ours
    assert '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>{"rain": true}' in ours


def test_reasoning_is_found_under_all_its_names_as_in_transformers(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }};{% endfor %}"
    )
    directory = save(tmp_path, byte_level(), chat_template=template)
    chat = [
        {"role": "assistant", "content": "a", "reasoning": "r"},
        {"role": "assistant", "content": "b", "thinking": "t"},
        {"role": "assistant", "reasoning_content": "c", "content": None},
    ]
    ours = Tokenizer.load(directory).apply_chat_template(chat)
    assert ours == auto_tokenizer(directory).apply_chat_template(chat, tokenize=False) == "r|r|a;t|t|b;c|c|;"


def test_bos_is_not_added_a_second_time_to_a_chat(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, with_bos(byte_level()), chat_template=GEMMA))
    ids = tokenizer.encode_chat(CHAT)
    bos = tokenizer.backend.token_to_id("<s>")
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_the_template_file_goes_before_the_configuration_and_default_before_others(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    directory = save(tmp_path, byte_level(), chat_template=named)
    assert Tokenizer.load(directory).apply_chat_template(CHAT) == "default"
    (directory / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(directory).apply_chat_template(CHAT) == "file"


def test_a_missing_template_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        Tokenizer.load(save(tmp_path, byte_level())).apply_chat_template(CHAT)
    assert "plain prompt" in caught.value.hint


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "system", "content": "x"}], "System role not supported"),
        ([CHAT[0], CHAT[0]], "roles must alternate"),
        ([], "non-empty list"),
        ([{"content": "x"}], "with a role"),
        (["hello"], "with a role"),
        ([{"role": "user", "content": b"x"}], "not plain JSON"),
    ],
)
def test_a_conversation_the_template_refuses_is_a_request_error(
    chat: Any, message: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(), chat_template=GEMMA))
    with pytest.raises(RequestError, match=message):
        tokenizer.apply_chat_template(chat)


@pytest.mark.parametrize(
    ("template", "message", "hint"),
    [
        ("{{ messages.__class__.__mro__ }}", "is not valid", "a plain prompt"),
        ("{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}", "is not valid", "a plain prompt"),
        ("{{ messages.append(1) }}", "is not valid", "a plain prompt"),
        ("{% set ns = namespace(__class__=1) %}", "is not valid", "a plain prompt"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "is not valid", "a plain prompt"),
        ("{% if %}", "is not valid", "a plain prompt"),
        ("{{ open('x') }}", "fails on this conversation", "content"),
        ("{{ messages[0].content + 1 }}", "fails on this conversation", "content"),
        ("{{ raise_exception('no\n' * 500000) }}", "refuses this conversation: no no", "roles"),
        ("{{ 'a' | center(2000000000) }}", "exceeds a limit on this conversation: it ", "shorter"),
        ("{{ '%2000000000d' % 1 }}", "exceeds a limit on this conversation: it ", "shorter"),
        ("{{ 'a' * 40000000 }}", "it renders 40,000,000 char|takes more than", "shorter"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply", "shorter"),
    ],
)
def test_hostile_and_broken_templates(template: str, message: str, hint: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(RequestError, match=message) as caught:
        tokenizer.apply_chat_template(CHAT)
    assert hint in caught.value.hint
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message


def test_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert Tokenizer(byte_level(), chat_template="first").apply_chat_template(CHAT) == "first"
    with monkeypatch.context() as patch:
        patch.setattr(worker, "SECONDS", 0.3)
        with pytest.raises(RequestError, match=r"takes more than 0\.3 seconds") as caught:
            Tokenizer(byte_level(), chat_template=endless).apply_chat_template(CHAT)
    assert "plain prompt" in caught.value.hint
    assert Tokenizer(byte_level(), chat_template="next").apply_chat_template(CHAT) == "next"


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(*parts: dict[str, Any]) -> dict[str, Any]:
    single = [*parts, {"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


WORD_PIECE = {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##"}
DOUBLED = [replace({"String": "a"}, "aa"), replace({"String": "aa"}, "aaaa")] * 20


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"pre_tokenizer": split("(x+x+)+y")}, "x" * 40, "retry-limit"),
        ({"normalizer": replace({"Regex": "(a+)+$"}, "b")}, "a" * 40 + "! x", "retry-limit"),
        ({"normalizer": replace({"String": ""}, "b")}, "Once 你好", "index out of bounds"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": DOUBLED}},
            "a",
            "ends the process|takes more than",
        ),
        ({"post_processor": template({"SpecialToken": {"id": "?", "type_id": 0}})}, "Once", "no entry found"),
        ({"model": {**WORD_PIECE, "max_input_chars_per_word": 9, "vocab": {"a": 0}}}, "Once", "WordPiece"),
    ],
)
def test_text_that_the_tokenizer_fails_on_is_a_request_error(
    changes: dict[str, Any], text: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(byte_level().to_str()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    engine = Engine(NoBackend(), Tokenizer.load(tmp_path), (), 64)
    with pytest.raises(RequestError, match=f"cannot encode this text: .*({message})") as caught:
        engine.add_request(text)
    assert caught.value.hint
    assert not engine.has_unfinished
    assert capfd.readouterr().err == ""
    if "Once" not in text:
        engine.add_request("b")  # the next request is served
        assert engine.has_unfinished


class NoBackend:
    """A backend that is never run."""

    num_blocks, block_size = 8, 32


def test_expression_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    # Polynomial: below the library's own limit at each place, and slow at thousands of places.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(?:x|y)*(?:x|z)*[?!]"), "isolated")
    encoder = TextEncoder(tokenizer)
    assert encoder.encode("Ab").ids
    with monkeypatch.context() as patch:
        patch.setattr(worker, "SECONDS", 0.3)
        with pytest.raises(RequestError, match=r"takes more than 0\.3 seconds") as caught:
            encoder.encode("x" * 2500 + "-!")
    assert "shorter" in caught.value.hint
    assert encoder.encode("Ab").ids


def test_half_a_surrogate_pair_is_named() -> None:
    with pytest.raises(RequestError, match=r"character 2 of the text is no character: '\\ud83d'") as caught:
        Tokenizer(byte_level()).encode("ab\ud83d")
    assert caught.value.hint == "remove it"


@pytest.mark.parametrize("special", [True, False])
def test_encoding_in_a_process_of_its_own_changes_nothing(special: bool) -> None:
    tokenizer = with_bos(byte_level())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex("(?:own|pattern)|.+?"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.encode_special_tokens = True
    assert not is_bounded(tokenizer)
    encoder = TextEncoder(tokenizer)
    for text in TEXTS:
        expected = tokenizer.encode(text, add_special_tokens=special)
        assert encoder.encode(text, special).ids == expected.ids
        assert encoder.encode(text, special).special == expected.special_tokens_mask


def test_ordinary_tokenizers_encode_in_this_process() -> None:
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tekken = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for pattern in (gpt2, llama3, llama3.replace("{1,3}", ""), tekken):
        tokenizer = with_bos(byte_level())
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        assert is_bounded(tokenizer)
    assert is_bounded(with_bos(byte_level()))
    assert is_bounded(with_bos(sentencepiece()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", PANICS_AT_LOAD, "cannot be read: the tokenizers library fails: range end"),
        ("tokenizer_config.json", "{", "no valid JSON"),
        ("tokenizer_config.json", "[]", "holds a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "malformed"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', "malformed"),
        ("tokenizer_config.json", '{"chat_template": 5}', "malformed"),
        ("tokenizer_config.json", '{"a":' * 100_000, "no valid JSON"),
    ],
)
def test_damaged_files_are_named(
    name: str, content: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, byte_level())
    (tmp_path / name).write_text(content)
    with pytest.raises(BundleError, match=message):
        Tokenizer.load(tmp_path)
    assert capfd.readouterr().err == ""


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_alone_is_enough(tmp_path: Path) -> None:
    save(tmp_path, with_bos(byte_level()))
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Once upon")) == "Once upon"
    assert tokenizer.special_tokens == {}


def test_the_special_tokens_of_a_piece_keep_their_meaning(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    assert_same(save(tmp_path, tokenizer), ["Once <mask> upon"])


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="the trained checkpoint stories260K is not here")
def test_a_trained_checkpoint_is_read_as_auto_tokenizer_reads_it() -> None:
    assert_same(CHECKPOINT)
    tokenizer = Tokenizer.load(CHECKPOINT)
    prompt = tokenizer.encode("Once upon")
    detokenizer = tokenizer.detokenizer(prompt)
    following = tokenizer.encode("a time", add_special_tokens=False)
    assert "".join(map(detokenizer.push, following)) == " a time"
