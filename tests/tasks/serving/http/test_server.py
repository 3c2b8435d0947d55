"""The server as OpenAI's own client sees it: every budget, in parallel, in one process."""

import asyncio
import contextlib
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_core import extract
from elastic_core.errors import UserError
from tasks.serving.batch import Batch
from tasks.serving.family import Family
from tasks.serving.http.app import LARGEST_BODY, bind
from tasks.serving.jobs import Limits
from tests.support.flows_fixture.driver import wait_for
from tests.support.models.running_server import running_server
from tests.support.models.served_family import write_served_family

KEY = "a-secret-key"
QUESTION = [{"role": "user", "content": "six times seven?"}]
BUDGETS = ("full", "medium", "small")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    write_served_family(directory / "family")
    return directory


@pytest.fixture(scope="module")
def family(directory):
    return Family(directory / "family")


@pytest.fixture(scope="module")
def server(family):
    with running_server(family, Limits(max_batch=4, context=256), KEY) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def extracted(directory):
    models = {}
    for name in BUDGETS:
        extract(directory / "family", name, directory / name)
        models[name] = AutoModelForCausalLM.from_pretrained(directory / name).eval()
    return models


def greedy(family: Family, model, prompt: list[int], number: int) -> str:
    """The text of the extracted model, by plain transformers."""
    ids = torch.tensor([prompt])
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=number)[0, len(prompt) :]
    return family.tokenizer.decode(tokens, skip_special_tokens=True)


def test_the_models_are_the_budgets(client, family):
    models = client.models.list().data
    assert [model.id for model in models] == list(BUDGETS)
    assert [model.num_parameters for model in models] == [b.num_parameters for b in family.budgets.values()]
    share = family.budget("medium").num_parameters / family.budget("full").num_parameters
    assert client.models.retrieve(f"{share:.4f}").num_parameters == family.budget("medium").num_parameters
    for name in ("huge", "0.01", "x" * 100):
        with pytest.raises(openai.NotFoundError, match=r"budget: got|got 100 characters"):
            client.chat.completions.create(model=name, messages=QUESTION)


def test_texts_of_all_budgets_in_parallel_are_those_of_the_extracted_models(server, family, extracted):
    """Different prompts and lengths, chats and texts, whole and in chunks."""
    cases = [(BUDGETS[i % 3], "what is " + "really " * (i % 4) + "it?", 4 + i, i % 2 == 0) for i in range(12)]

    async def ask(client, budget, text, number, stream):
        messages = [{"role": "user", "content": text}]
        answer = await client.chat.completions.create(
            model=budget, messages=messages, max_completion_tokens=number, stream=stream
        )
        if not stream:
            return answer.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0) as client:
            texts = client.completions.create(model="small", prompt=["one", "two three"], max_tokens=7)
            return await asyncio.gather(texts, *(ask(client, *case) for case in cases))

    texts, *answers = asyncio.run(ask_all())
    for (budget, text, number, _), answer in zip(cases, answers, strict=True):
        prompt = family.chat_tokens([{"role": "user", "content": text}])
        assert answer == greedy(family, extracted[budget], prompt, number)
    for choice, text in zip(texts.choices, ("one", "two three"), strict=True):
        assert choice.text == greedy(family, extracted["small"], family.tokens(text), 7)


def test_an_answer_in_chunks(client):
    options = {"model": "full", "messages": QUESTION, "max_tokens": 9, "temperature": 2.0, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**options, extra_body={"tools": None, "stream": None})  # null says nothing
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
        assert own[0].delta.role == choice.message.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_log_probabilities_are_those_of_the_extracted_model(client, family, extracted):
    prompt = family.tokens("in the beginning")
    answer = client.completions.create(model="medium", prompt=prompt, max_tokens=5, logprobs=2, temperature=0)
    found = answer.choices[0].logprobs
    ids = torch.tensor([[*prompt, *(family.tokenizer.convert_tokens_to_ids(token) for token in found.tokens)]])
    with torch.no_grad():
        expected = extracted["medium"](ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    likeliest = expected.topk(2)
    assert found.token_logprobs == pytest.approx(likeliest.values[:, 0].tolist(), abs=1e-4)
    for entry, values in zip(found.top_logprobs, likeliest.values, strict=True):
        assert list(entry.values()) == pytest.approx(values.tolist(), abs=1e-4)
    same = client.completions.create(
        model="medium", prompt=prompt, max_tokens=5, logprobs=2, temperature=0, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in same]
    assert [start for part in parts for start in part.text_offset] == found.text_offset == list(range(5))
    assert [token for part in parts for token in part.tokens] == found.tokens
    options = {"model": "medium", "messages": QUESTION, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert len(content) == 4 and all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    streamed = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**options, stream=True)]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs.content] == content


def test_stop_strings_seeds_and_ends(client):
    options = {"model": "small", "prompt": "once", "temperature": 3.0, "seed": 5, "max_tokens": 60}
    free = client.completions.create(**options, extra_body={"ignore_eos": True})
    text = free.choices[0].text
    assert free.choices[0].finish_reason == "length" and free.usage.completion_tokens == 60
    assert client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0].text == text
    end = text[20:22]
    stopped = client.completions.create(**options, stop=[end], extra_body={"ignore_eos": True}).choices[0]
    assert stopped.text == text[: text.index(end)] and stopped.finish_reason == "stop"
    assert len(client.completions.create(model="small", prompt="once", stop=["\x00"], seed=1).choices[0].text) <= 16


def test_two_turns_of_a_conversation_use_two_budgets(client, family, extracted):
    """Think small, answer large: the second budget reads what the first has written, and goes on with it."""
    small = client.chat.completions.create(model="small", messages=QUESTION, max_tokens=6, stop=["</think>"])
    thought = small.choices[0].message.content
    messages = [*QUESTION, {"role": "assistant", "content": thought}]
    options = {"model": "full", "max_tokens": 6}
    large = client.chat.completions.create(messages=messages, **options, extra_body={"continue_final_message": True})
    prompt = family.chat_tokens(QUESTION) + family.tokens(thought)
    assert large.choices[0].message.content == greedy(family, extracted["full"], prompt, 6)
    assert large.usage.prompt_tokens == len(prompt)
    last = [*QUESTION, {"role": "assistant", "content": thought + large.choices[0].message.content}]
    again = client.chat.completions.create(messages=last, **options, extra_body={"continue_final_message": True})
    assert again.usage.prompt_tokens_details.cached_tokens >= len(prompt)  # what the large budget has read itself
    switched = client.chat.completions.create(
        messages=QUESTION, model="small", max_tokens=1, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
    )
    assert switched.usage.prompt_tokens == len(family.chat_tokens(QUESTION)) + 2


@pytest.mark.parametrize(
    "body, message",
    [
        ({"tools": []}, "tools: is not supported by this server"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 0}, "n: "),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": float("nan")}, "temperature: |JSON|valid"),
        ({"stop": [""]}, "stop: got"),
        ({"top_logprobs": 3}, "top_logprobs: needs logprobs: true"),
        ({"max_tokens": 5000}, "tokens of the prompt and 5000 new ones; allowed: 256 in all"),
        ({"logit_bias": {"5000": 1}}, "logit_bias: allowed: token ids below"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content that is no text"),
        ({"messages": [{"content": "a"}]}, "got the role None"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "allowed: variables of the chat template"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "allowed: variables of the chat template"),
        ({"chat_template_kwargs": {"where": 1, "self": 1}}, "got self, where; allowed: variables"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"temperature": 1e-44}, "temperature or repetition_penalty is too extreme"),
    ],
)
def test_what_cannot_be_done_is_refused(server, body, message):
    content = json.dumps({"model": "small", "messages": QUESTION, **body})
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server[0]}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert any(part in error["message"] for part in message.split("|")) and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [10**9], [-1], [[1], []], ["a"] * 100])
def test_prompts_that_are_none_are_refused(client, prompt):
    with pytest.raises(openai.BadRequestError, match="prompt"):
        client.completions.create(model="small", prompt=prompt)


def test_the_key_is_asked_for_and_written_nowhere(server, caplog, capfd):
    wrong = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="wrong-secret", max_retries=0)
    with caplog.at_level(logging.DEBUG, "elastic.serve"):
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            wrong.models.list()
        right = openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0)
        right.completions.create(model="small", prompt="a private text", max_tokens=2)
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok"}  # needs no key
    written = "".join([caplog.text, *capfd.readouterr()])
    assert "text small: 14 + 2 tokens" in written
    assert not any(secret in written for secret in (KEY, "wrong-secret", "private"))


def test_bodies_without_end_and_other_addresses(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    address = f"{server[0]}/v1/completions"
    with socket.create_connection(("127.0.0.1", int(server[0].rpartition(":")[2])), 10) as line:
        request = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        line.sendall(f"{request}Content-Length: {LARGEST_BODY + 1}\r\n\r\n".encode())
        assert b" 413 " in line.recv(100)
    assert httpx.post(address, content=iter([b"{}"]), headers=headers).status_code == 411
    assert httpx.get(f"{server[0]}/v1/nothing", headers=headers).json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(UserError, match="name a free port"):
        bind("127.0.0.1", int(server[0].rpartition(":")[2]))


def test_metrics(client, server):
    assert wait_until_idle(server[1])
    client.completions.create(model="medium", prompt="a", max_tokens=3, extra_body={"ignore_eos": True})
    assert wait_until_idle(server[1])
    text = httpx.get(f"{server[0]}/metrics").text
    assert 'elastic_texts_total{budget="medium",outcome="length"}' in text
    assert "elastic_running 0.0" in text and 'elastic_first_token_seconds_count{budget="medium"}' in text


def wait_until(condition) -> bool:
    return wait_for(condition, 30, "the engine", every=0.01)


def wait_until_idle(engine) -> bool:
    return wait_until(lambda: engine._num_running() == 0)


def test_limits_of_queue_and_time_and_clients_that_leave(family, monkeypatch):
    """One text at a time and one in the queue, and a model that takes 20 ms for a token."""
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: time.sleep(0.02) or step(batch))
    with running_server(family, Limits(max_batch=1, max_waiting=1, context=512), timeout=60) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for ask, given in ((client.completions, {"prompt": "a"}), (client.chat.completions, {"messages": QUESTION})):
            with pytest.raises(openai.BadRequestError, match="got 2 choices; allowed: 1 in all") as refused:
                ask.create(model="full", n=2, **given)
            assert refused.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="got 2 prompts with 1 choices each; allowed: 1 in all"):
            client.completions.create(model="full", prompt=["a", "b"])
        long = {"model": "full", "prompt": "a", "max_tokens": 500, "extra_body": {"ignore_eos": True}}
        leaving = client.completions.create(**long, stream=True)
        next(iter(leaving))
        leaving.close()
        assert wait_until_idle(engine)

        async def leave() -> None:
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                waiting = asyncio.create_task(client.completions.create(**long))
                while not engine._num_running():
                    await asyncio.sleep(0.01)
                waiting.cancel()

        asyncio.run(leave())
        assert wait_until_idle(engine)
        assert 'elastic_texts_total{budget="full",outcome="cancelled"} 2.0' in httpx.get(f"{address}/metrics").text

        first = iter(client.completions.create(**long, stream=True))
        next(first)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(client.completions.create, **long)
            assert wait_until(lambda: engine._waiting)
            with pytest.raises(openai.RateLimitError, match="places in the queue are taken") as refused:
                client.completions.create(**long)
            assert refused.value.response.headers["Retry-After"] == "1"
            jobs = [engine._waiting[0], engine._texts()[0].job]
            for job in jobs:
                assert job.deadline - job.begin == pytest.approx(60, abs=10)
                job.deadline = 0
            with pytest.raises(openai.APIError, match="longer than the server's time limit"):
                list(first)
            with pytest.raises(openai.InternalServerError, match="longer than the server's time limit"):
                second.result()
        assert wait_until_idle(engine)


def test_a_request_that_cannot_be_prepared_for_want_of_memory(client, monkeypatch):
    def fail(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("tasks.serving.http.service.Chooser", fail)
    with pytest.raises(openai.InternalServerError, match="the server is out of memory") as refused:
        client.completions.create(model="small", prompt="a")
    assert refused.value.response.headers["Retry-After"] == "1" and refused.value.code == "memory"


def test_a_stopped_engine_is_not_healthy(family):
    with running_server(family, Limits()) as (address, engine):
        engine.stop()
        assert httpx.get(f"{address}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            client.completions.create(model="small", prompt="a")


def test_requests_that_run_when_the_server_ends_are_told_so(family, monkeypatch, capfd):
    """Short ones end as ever, long ones with an error in OpenAI's form, in the queue too. Nothing is logged."""
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda batch: time.sleep(0.02) or step(batch))
    monkeypatch.setattr("tasks.serving.http.app.GRACE", 5)
    long = {"model": "full", "prompt": "a", "max_tokens": 900, "ignore_eos": True}
    short = {**long, "model": "small", "max_tokens": 50}
    with ThreadPoolExecutor(4) as pool:
        with running_server(family, Limits(max_batch=2, context=1024)) as (address, engine):

            def ask(body):
                return pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=60)

            answers = [ask(body) for body in (long, long, {**long, "stream": True})]
            assert wait_until(lambda: engine._num_running() == 2 and engine._waiting)
            answers.append(ask(short))
            assert wait_until(lambda: engine._num_running() == 3)
        *whole, streamed, short = [answer.result() for answer in answers]
    stopping = {"message": "the server is stopping", "type": "server_error", "param": None, "code": "stopped"}
    for answer in whole:
        assert answer.status_code == 503 and answer.json() == {"error": stopping}
        assert answer.headers["Retry-After"] == "1"
    events = [line for line in streamed.text.splitlines() if line]
    assert streamed.status_code == 200 and json.loads(events[-1].removeprefix("data: ")) == {"error": stopping}
    assert short.status_code == 200 and short.json()["usage"]["completion_tokens"] == 50
    assert capfd.readouterr().err == ""


def test_a_request_whose_body_never_comes_is_answered_at_the_end_of_the_server(family, monkeypatch, capfd):
    monkeypatch.setattr("tasks.serving.http.app.GRACE", 0)
    monkeypatch.setattr("tasks.serving.http.app.SENDING", 0.1)
    with contextlib.ExitStack() as line:
        with running_server(family, Limits()) as (address, _):
            place = "127.0.0.1", int(address.rpartition(":")[2])
            sent = line.enter_context(socket.create_connection(place, 10))
            sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
            httpx.get(f"{address}/health")  # the server has read the other line too
        answer = line.enter_context(sent.makefile("rb")).read()
    assert answer.startswith(b"HTTP/1.1 503 ") and b'"the server is stopping"' in answer
    assert "Traceback" not in capfd.readouterr().err
