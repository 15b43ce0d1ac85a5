"""Sessions, models and samplers of Tinker's API, and the futures of what they are asked.

Every request has a number of its client's own, in whose order it takes effect. It is written to the folder before it is
acknowledged, and so is its result before anybody sees it. A service that is killed goes on from there: a model begins
with the last state that was kept and does again what came after it, to the same bits.

FOLDER/sessions/ID.json                         a session
FOLDER/models/ID/requests/00000003.optim_step.crc   what was asked, after its checksum
FOLDER/models/ID/results/00000003.json          what it came to (.pb: a protobuf message)
FOLDER/models/ID/state/                         what is trained, as it was after a number; spec.json has checksums
FOLDER/models/ID/weights/NAME/, sampler_weights/NAME/
FOLDER/samplers/ID/                             its weights' path, its requests and results
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from grpo.endpoint.api_error import ApiError
from grpo.learner.learner import Learner
from grpo.run.lock import RunLock
from grpo.tinker import sampler, wire
from grpo.tinker.model import Spec, forward_backward, learner_of, load_state, optim_step, state_of
from grpo.tinker.sampler import Sampler, spec_in, tensors_of, unmoved
from grpo.tinker.wire import SCHEME, Refused
from policies import tensor_files
from policies.files.atomic import tidy, write_file, write_folder
from policies.files.checksums import size_and_hash
from policies.policy import Policy
from rewards.config.json_file import read_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ID = re.compile(r"[A-Za-z0-9]+:(train|sample):[0-9]+")  # of a model or a sampler, whose folder has the same name
KEEP_STATE_S = 30.0  # between two states of a model that are kept: what came after the last one is done again
RESULTS = 4096  # the last ones of each model and sampler are kept
UNNAMED = 16  # weights for sampling without a name that are kept of each model
TURNS = 16  # requests of one sampler in a row while others wait: each change of weights merges adapters again
MOST_NUMBER = 10**8 - 1  # of requests, models and samplers: the names of their files have eight digits
MOST_OF_ONE, MOST_WAITING = 1024, 8192  # requests that wait: of one model or sampler, and of one owner
MOST_BYTES = 1 << 28  # of the requests of one owner that wait
MOST_LOADED = 16  # models of one owner in memory
MOST_SESSIONS = 4096  # of one owner


Thing = TypeVar("Thing")


class Unknown(ApiError):
    """There is no such thing here, or not for this key; the message names it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 404)


@dataclass
class Job:
    """A request whose result may be waited for. It is in a file; `result` is one that could not be written."""

    owner: Model | SamplingSession
    number: int
    kind: str
    size: int = 0  # bytes of its body, while it waits
    checksum: int | None = None  # of its body; None for one of a service before
    again: bool = False  # it was done before the service was killed, and its result is known
    result: tuple[str, bytes] | None = None
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def request_id(self) -> str:
        return f"{self.owner.id}:{self.number}"

    @property
    def path(self) -> Path:
        """What is asked, while it waits."""
        return self.owner.files.requests / f"{self.number:08d}.{self.kind}"

    def refuse_another(self, kind: str, body: bytes) -> None:
        """Raises Refused if this is another request under the number of this one: two clients number theirs as one.

        A request that was refused has no content to compare. The SDK may write a message of protobuf in several ways.
        """
        if "refused" in (self.kind, kind) or not self.kind:
            return
        is_json = kind != "forward_backward"
        same = self.kind == kind and (not is_json or self.checksum in (None, zlib.crc32(body)))
        if not same:
            raise Refused(
                f"request {self.number} of {self.owner.id} was another {self.kind}; number each request once, and use "
                "a session for each client"
            )

    def read(self) -> tuple[str, bytes]:
        """The result, once it is there: a protobuf message, or JSON. Raises Unknown where it is no longer kept."""
        if self.result is not None:
            return self.result
        for form in ("pb", "json"):
            with suppress(FileNotFoundError):
                return form, _content(self.owner.files.results / f"{self.number:08d}.{form}")
        raise Unknown(f"request {self.request_id}: its result is no longer kept")


class Requests:
    """The requests and results of one model or sampler, in files."""

    def __init__(self, folder: Path) -> None:
        self.requests, self.results = folder / "requests", folder / "results"
        for part in (self.requests, self.results):
            part.mkdir(parents=True, exist_ok=True)
            tidy(part)

    def stored(self) -> list[tuple[int, str, int]]:
        """Returns the numbers, kinds and sizes of what was asked, in order."""
        return [(number, path.name.split(".")[1], path.stat().st_size) for number, path in _numbered(self.requests)]

    def remove(self, number: int) -> None:
        """Remove a request and its result."""
        for folder in (self.requests, self.results):
            for path in folder.glob(f"{number:08d}.*"):
                path.unlink()

    def forget(self, number: int, answered: Collection[int] = ()) -> None:
        """Remove requests up to this one, and results long before it. Those of `answered` stay: their clients may not
        have read them yet."""
        for folder, last in ((self.requests, number), (self.results, number - RESULTS)):
            kept = answered if folder is self.results else ()
            for known, path in _numbered(folder):
                if known <= last and known not in kept:
                    path.unlink()


class Model:
    """What a training client has. Its requests wait until those with lower numbers are here."""

    def __init__(self, folder: Path, id_: str) -> None:
        self.folder, self.id, self.files = folder, id_, Requests(folder)
        self.next = 0
        self.waiting: dict[int, Job] = {}
        self.spec: Spec | None = None
        self.learner: Learner | None = None
        self.last = -1  # the last request that was handled, and when
        self.used_at = self.kept_at = time.monotonic()
        self.damage = ""  # why nothing more is computed

    def path_of(self, part: str, name: str) -> str:
        return f"{SCHEME}{self.id}/{part}/{name}"

    @property
    def gradients_wait(self) -> bool:
        return self.learner is not None and bool(self.learner.waiting)


@dataclass(eq=False)
class SamplingSession:
    """What a sampling client has: weights, by their path, or the base's. `place` counts those of the same weights that
    its session had before. `written` is the request that wrote the weights, which tells them from later ones under the
    same path; None for the base's, and for a sampler of version 0.2."""

    folder: Path
    id: str
    path: str | None
    place: int
    written: int | None = None

    def __post_init__(self) -> None:
        self.files = Requests(self.folder)
        self.answered: deque[int] = deque(maxlen=RESULTS)  # the last ones, which need not have the highest numbers

    def key(self, number: int) -> str:
        """Gives what the noise of a request depends on. Another session that asks the same in the same order gets the
        same. An SDK that tries again may give a sampling session another number, so that is no part of it."""
        weights = "base" if self.path is None else self.path.partition(":train:")[2]
        return f"{weights}/{self.place}/{number}"


class Service:
    """Answers for one policy. Two threads compute: one trains in the order of requests, and one samples."""

    def __init__(self, base: Policy, name: str, folder: Path, dtype: torch.dtype) -> None:
        self.base, self.name, self.folder = base, name, folder
        self.lock = RunLock(folder, "state")
        self.lock.lock_folder()
        for part in ("sessions", "models", "samplers"):
            (folder / part).mkdir(exist_ok=True)
            tidy(folder / part)
        self._mutex = threading.RLock()
        self._saved = threading.Lock()  # which folders of weights there are
        self.sessions: dict[str, dict[str, Any]] = {}
        self.models: dict[str, Model] = {}
        self.samplers: dict[str, SamplingSession] = {}
        self.jobs: dict[str, Job] = {}
        self.sampler = Sampler(base, dtype)
        self._training: SimpleQueue[Job | None] = SimpleQueue()
        self._samples: list[Job] = []
        self._wakes = threading.Condition(self._mutex)
        self._closed = False
        self._waiting: dict[str, Job] = {}  # by their request_id
        self._recover()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._train, self._sample)]
        for thread in self._threads:
            thread.start()

    # ---- what is there -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        alive = all(thread.is_alive() for thread in self._threads)
        return {"status": "ok" if alive else "a computing thread has ended"}

    def create_session(self, content: Mapping[str, Any]) -> str:
        """A session with this content; its `owner` has what is made in it."""
        session = secrets.token_hex(8)
        content = {"owner": "", "at": time.time(), **content}
        with self._mutex:
            self._forget_a_session(content["owner"])
            write_file(self.folder / "sessions" / f"{session}.json", json.dumps(content))
            self.sessions[session] = _brief(content)
        return session

    def _forget_a_session(self, owner: str) -> None:
        """Remove the oldest session in which nothing was made, if an owner has as many as may be. Raises Refused if
        something was made in all of them."""
        own = [session for session in self.sessions if self.owner(session) == owner]
        if len(own) < MOST_SESSIONS:
            return
        used = {session_of(id_) for id_ in (*self.models, *self.samplers)}
        empty = [session for session in own if session not in used]
        if not empty:
            raise Refused(f"there are {len(own):,} sessions with models or samplers; go on in one of them")
        oldest = min(empty, key=lambda session: self.sessions[session].get("at", 0.0))
        (self.folder / "sessions" / f"{oldest}.json").unlink(missing_ok=True)
        del self.sessions[oldest]

    def owns(self, owner: str, id_: str) -> bool:
        """Whether the session of an id or a path is there for this owner. One of version 0.2 has no owner and is there
        for all."""
        session = self.sessions.get(session_of(id_))
        return session is not None and session.get("owner", owner) == owner

    def session(self, id_: str, owner: str = "") -> None:
        """Raises Unknown where the session of this id, or path, is not there for this owner."""
        if not self.owns(owner, id_):
            raise Unknown(f"{id_!r:.120}: there is nothing of this id here, or no longer")

    def owner(self, id_: str) -> str:
        """The owner of an id or a path; empty for one of version 0.2, and without keys."""
        return self.sessions.get(session_of(id_), {}).get("owner", "")

    def model(self, model_id: str) -> Model:
        return _found(self.models, model_id)

    def sampling_session(self, id_: str) -> SamplingSession:
        return _found(self.samplers, id_)

    def add_sampler(self, session: str, number: int, path: str | None) -> str:
        """A sampler of these weights; asked again with its number it is the same one."""
        check_number("sampling_session_seq_id", number)
        written = None
        if path is not None:
            folder = self.folder_of(path)
            with unmoved(folder):
                written = _number(folder)
        id_ = f"{session}:sample:{number}"
        with self._mutex:
            if id_ not in self.samplers:
                folder = self.folder / "samplers" / _folder_name(id_)
                of_session = [s for s in self.samplers.values() if s.id.startswith(f"{session}:") and s.path == path]
                sampling = SamplingSession(folder, id_, path, len(of_session), written)
                content = {"id": id_, "path": path, "place": sampling.place, "written": written}
                write_file(folder / "sampler.json", json.dumps(content))
                self.samplers[id_] = sampling
            if (other := self.samplers[id_].path) != path:
                raise Refused(f"sampling_session_seq_id={number}: it is a sampler of {other or 'the base'} already")
        return id_

    def _hold_weights(self, sampling: SamplingSession) -> None:
        """Let the engine hold a sampler's weights. Raises Refused where others took their place, also while they are
        read: then it holds nobody's."""
        if sampling.path is None:
            self.sampler.hold_weights(sampling.id, None)
            return
        folder = self.folder_of(sampling.path)
        try:
            with unmoved(folder):
                if sampling.written not in (None, _number(folder)):
                    why = "its weights are no longer those of this sampler; create another"
                    raise Refused(f"path {sampling.path!r}: {why}")
                self.sampler.hold_weights(sampling.id, folder)
        except Refused:
            self.sampler.of = ""
            raise

    def folder_of(self, path: str) -> Path:
        """The folder of weights that were saved. Raises Refused for a path that leads nowhere."""
        parts = path.removeprefix(SCHEME).split("/")
        if path.startswith(SCHEME) and len(parts) == 3 and parts[1] in ("weights", "sampler_weights"):
            model = self.models.get(parts[0])
            if model is not None and (NAME.fullmatch(parts[2]) or parts[2].startswith("@")):
                folder = model.folder / parts[1] / parts[2]
                if (folder / "spec.json").is_file():
                    return folder
        raise Refused(f"path {path!r:.120}: no weights are saved here under it; it is tinker://RUN/weights/NAME")

    def checkpoints(self, model: Model) -> list[dict[str, Any]]:
        """What is saved of a model under names, as Tinker's Checkpoint has it."""
        found = []
        for part, kind in (("weights", "training"), ("sampler_weights", "sampler")):
            for path in sorted((model.folder / part).glob("*")):
                if not NAME.fullmatch(path.name):
                    continue
                with suppress(FileNotFoundError):  # deleted meanwhile
                    size = sum(file.stat().st_size for file in path.iterdir())
                    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(path.stat().st_mtime))
                    found.append(
                        {
                            "checkpoint_id": f"{part}/{path.name}",
                            "checkpoint_type": kind,
                            "time": at,
                            "size_bytes": size,
                            "tinker_path": model.path_of(part, path.name),
                        }
                    )
        return found

    def spec_of(self, path: str) -> Spec:
        """What the policy is whose weights were saved under a path. Raises Refused where there are none."""
        folder = self.folder_of(path)
        with unmoved(folder):
            return spec_in(folder)

    def delete_checkpoint(self, model: Model, place: str) -> None:
        """Raises Refused where there is none, also for all but one of those who delete it at once."""
        with self._saved:
            _remove(self.folder_of(f"{SCHEME}{model.id}/{place}"))

    # ---- requests ------------------------------------------------------------------------------------------------

    def ask(self, model_id: str, number: int | None, kind: str, body: bytes) -> Job:
        """A request to a model, which has a result when those with lower numbers have theirs. Sent again, it is the
        same one. Number 0 makes the model."""
        number = check_number("seq_id", number)
        with self._mutex:
            if (known := self.jobs.get(f"{model_id}:{number}")) is not None:
                known.refuse_another(kind, body)
                return known
            model = self.models.get(model_id) if number == 0 else self.model(model_id)
            if model is not None and number < model.next:
                raise Unknown(f"request {number} of model {model_id}: its result is no longer kept")
            is_missing = model is not None and bool(model.waiting) and number == model.next
            if not is_missing:  # others wait for this one: without it they would wait for ever
                self._check_waiting(model_id, len(body))
            if model is None:
                folder = self.folder / "models" / _folder_name(model_id)
                model = self.models[model_id] = Model(folder, model_id)
            return self._enter(Job(model, number, kind, len(body), zlib.crc32(body)), body)

    def ask_sampler(self, id_: str, number: int | None, body: bytes) -> Job:
        sampling = self.sampling_session(id_)
        number = check_number("seq_id", number)
        with self._mutex:
            if (known := self.jobs.get(f"{id_}:{number}")) is not None:
                known.refuse_another("sample", body)
                return known
            self._check_waiting(id_, len(body))
            return self._enter(Job(sampling, number, "sample", len(body), zlib.crc32(body)), body)

    def job(self, request_id: str) -> Job:
        return _found(self.jobs, request_id)

    def _check_waiting(self, id_: str, size: int) -> None:
        """Raises ApiError if more would wait than may: of one model or sampler, of its owner, and bytes. What one owner
        leaves waiting keeps no other from asking."""
        owner = self.owner(id_)
        of_one, of_owner, size_of_owner = 0, 0, 0
        for job in self._waiting.values():
            of_one += job.owner.id == id_
            if self.owner(job.owner.id) == owner:
                of_owner += 1
                size_of_owner += job.size
        for what, count, most in (
            (f"requests of {id_}", of_one + 1, MOST_OF_ONE),
            ("requests", of_owner + 1, MOST_WAITING),
            ("bytes of requests", size_of_owner + size, MOST_BYTES),
        ):
            if count > most:
                message = f"{count:,} {what} would wait, and at most {most:,} may; wait for results, and send it again"
                model = self.models.get(id_)
                if model is not None and model.waiting:
                    message += f"; request {model.next} of the model has not come"
                raise ApiError(message, 429, headers={"Retry-After": "1"})

    def _enter(self, job: Job, body: bytes | None = None) -> Job:
        """Let a request wait for its turn. Its `body` is written before, unless a service before has done that."""
        with self._mutex:  # also while a service is made: a condition without its lock cannot notify
            if body is not None:
                _write_checked(job.path, body)
            self.jobs[job.request_id] = self._waiting[job.request_id] = job
            if isinstance(job.owner, SamplingSession):
                self._samples.append(job)
                self._wakes.notify()
                return job
            model = job.owner
            model.waiting[job.number] = job
            while (ready := model.waiting.pop(model.next, None)) is not None:
                model.next += 1
                self._training.put(ready)
            return job

    def _recover(self) -> None:
        """Take up what a service before has left. Raises ValueError, which names a damaged file."""
        for path in sorted((self.folder / "sessions").glob("*.json")):
            self.sessions[path.stem] = _brief(read_json(path))
        waiting: list[Job] = []
        for folder in sorted((self.folder / "models").iterdir()):
            model = Model(folder, folder.name.replace(".", ":"))
            self.models[model.id] = model
            for part in (folder, folder / "weights", folder / "sampler_weights"):
                tidy(part)
            if (folder / "spec.json").is_file():
                model.spec = spec_in(folder)
            if (folder / "state" / "spec.json").is_file():
                model.next = _number(folder / "state") + 1
            finished = self._finished(model)
            for number, kind, size in model.files.stored():
                if number >= model.next:
                    waiting.append(Job(model, number, kind, size, again=number in finished))
        # What is done again comes first: those models were in memory together, and no new gradient takes their room.
        for job in sorted(waiting, key=lambda job: not job.again):
            if job.again:
                job.done.set()
            self._enter(job)
        for folder in sorted(path.parent for path in (self.folder / "samplers").glob("*/sampler.json")):
            sampling = SamplingSession(folder, **read_json(folder / "sampler.json"))
            self.samplers[sampling.id] = sampling
            finished = self._finished(sampling)
            for number, kind, size in sampling.files.stored():
                if number not in finished:
                    self._enter(Job(sampling, number, kind, size))

    def _finished(self, owner: Model | SamplingSession) -> set[int]:
        """The numbers of the requests whose results are there; they can be asked for from now on."""
        finished = set()
        for number, _ in _numbered(owner.files.results):
            job = Job(owner, number, "")
            job.done.set()
            self.jobs[job.request_id] = job
            finished.add(number)
        return finished

    # ---- the two threads -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """What runs is finished; what waits is done by the next service in this folder."""
        with self._mutex:
            self._closed = True
            self._wakes.notify()
        self._training.put(None)
        for thread in self._threads:
            thread.join()
        self.lock.release()

    def _train(self) -> None:
        while (job := self._training.get()) is not None and not self._closed:
            self._do(job, self._of_model)

    def _sample(self) -> None:
        turns = 0
        while True:
            with self._mutex:
                while not self._samples and not self._closed:
                    self._wakes.wait()
                if self._closed:
                    return
                same = [job for job in self._samples if job.owner.id == self.sampler.of]
                turns = turns + 1 if same and turns < TURNS else 0
                job = same[0] if turns else self._samples[0]
                self._samples.remove(job)
            self._do(job, self._of_sampler)

    def _do(self, job: Job, act: Callable[[Job], tuple[str, bytes]]) -> None:
        try:
            form, content = act(job)
        except ApiError as error:
            form, content = "json", json.dumps({"error": str(error), "category": "user"}).encode()
        except Exception as error:
            form, content = _fault("the server has a fault", error)
        if not job.again:
            try:
                _write_checked(job.owner.files.results / f"{job.number:08d}.{form}", content)
            except Exception as error:  # such as a full disk
                job.result = _fault("the request was handled, but its result could not be kept", error)
        with self._mutex:
            del self._waiting[job.request_id]
            job.done.set()
            old = self.jobs.get(f"{job.owner.id}:{job.number - RESULTS}")
            if old is not None and old.done.is_set():
                del self.jobs[old.request_id]
        if isinstance(job.owner, Model):
            job.owner.last, job.owner.used_at = job.number, time.monotonic()
            try:
                self._keep_state(job.owner, job)
            except Exception as error:  # the next step tries again
                _fault("a state could not be kept", error)

    def _of_sampler(self, job: Job) -> tuple[str, bytes]:
        sampling = job.owner
        assert isinstance(sampling, SamplingSession)
        request, base = json.loads(_content(job.path)), self.base
        asked = sampler.read(request, sampling.key(job.number), base.stop_token_ids, base.max_length)
        self._hold_weights(sampling)
        sequences, of_prompt = self.sampler.sample(asked)
        with self._mutex:
            waiting = [other.number - 1 for other in self._samples if other.owner is sampling]
            old = _numbered(sampling.files.requests)[:-RESULTS]
            if old:
                sampling.files.forget(min([old[-1][0], *waiting]), set(sampling.answered))
        sampling.answered.append(job.number)
        return "pb", wire.write_samples(sequences, of_prompt)

    def _of_model(self, job: Job) -> tuple[str, bytes]:
        model = job.owner
        assert isinstance(model, Model)
        try:
            body = _content(job.path)
        except Refused as error:
            model.damage = model.damage or f"model {model.id} ends: {error}"
        if model.damage:  # what came after a request that is lost would be computed without it
            raise Refused(model.damage)
        try:
            return self._answer(model, job, body)
        except Exception as error:
            if job.again and not _is_error(*job.read()):
                model.damage = f"model {model.id} ends: request {job.number} cannot be done again: {error}"
            raise

    def _answer(self, model: Model, job: Job, body: bytes) -> tuple[str, bytes]:
        if job.number > 0 and model.learner is None:
            self._restore(model)
        if job.kind == "forward_backward":
            return "pb", self._forward_backward(model, job, body)
        act: Callable[[Model, Job, dict[str, Any]], dict[str, Any]] = getattr(self, f"_{job.kind}")
        answer = act(model, job, json.loads(body))
        return "json", json.dumps(answer | {"type": job.kind}).encode()

    def _refused(self, model: Model, job: Job, request: dict[str, Any]) -> dict[str, Any]:
        raise Refused(request["error"])

    def _create_model(self, model: Model, job: Job, request: dict[str, Any]) -> dict[str, Any]:
        self._check_new(request)
        lora = dict(request.get("lora_config") or {"rank": 0})
        lora["seed"] = int(model.id.rpartition(":")[2]) if lora.get("seed") is None else lora["seed"]
        most = max(64, self.base.trunk.get_input_embeddings().embedding_dim)  # of no use above
        if not 0 <= lora["rank"] <= most:
            raise Refused(f"lora_config.rank={lora['rank']}: use 1 to {most}, or 0 to train all weights")
        if not 0 <= lora["seed"] < 1 << 63:
            raise Refused(f"lora_config.seed={lora['seed']}: use 0 to {(1 << 63) - 1}")
        self._begin_training(model, Spec(**lora))
        return {"model_id": model.id}

    def _check_new(self, request: Mapping[str, Any]) -> None:
        """Raises Refused for a model of another base or with another optimizer."""
        if (name := request.get("base_model", self.name)) != self.name:
            raise Refused(f"base_model={name!r:.80}: this server has {self.name!r}")
        if (family := request.get("optimizer_config", {}).get("type", "adamw")) != "adamw":
            raise Refused(f"optimizer_config.type={family!r:.40}: this server has adamw")

    def _begin_training(self, model: Model, spec: Spec) -> None:
        self._make_room(model)
        model.learner, model.spec = learner_of(self.base, spec), spec
        write_file(model.folder / "spec.json", json.dumps(asdict(spec)))

    def _load_weights(self, model: Model, job: Job, request: dict[str, Any]) -> dict[str, Any]:
        self._check_new(request)
        folder = self.folder_of(request["path"])
        with unmoved(folder):
            tensors, spec = tensors_of(folder), spec_in(folder)
        if request["optimizer"] and "optimizer" not in tensors:
            raise Refused(f"path {request['path']!r}: weights for sampling have no state of an optimizer; load a state")
        if job.number == 0:
            self._begin_training(model, spec)
        load_state(self._learner(model), tensors, optimizer=request["optimizer"])
        return {"path": request["path"]}

    def _forward_backward(self, model: Model, job: Job, body: bytes) -> bytes:
        request = wire.read_forward_backward(body)
        if job.again and not request.backward:
            return b""
        return wire.write_outputs(forward_backward(self._learner(model), request))

    def _optim_step(self, model: Model, job: Job, request: dict[str, Any]) -> dict[str, Any]:
        if "adam_params" not in request:
            raise Refused("optimizer_params: this server has AdamW; send adam_params")
        return {"metrics": optim_step(self._learner(model), request["adam_params"])}

    def _save_weights(self, model: Model, job: Job, request: dict[str, Any]) -> dict[str, Any]:
        name = request.get("path") or f"{job.number:08d}"
        return {"path": self._save(model, job, "weights", name, request)}

    def _save_weights_for_sampler(self, model: Model, job: Job, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("kind", "snapshot") != "snapshot":
            raise Refused("kind='inflight': weights that change while they sample are not here; use kind='snapshot'")
        part, name = "sampler_weights", request.get("path")
        if name is not None:
            return {"path": self._save(model, job, part, name, request)}
        if job.again:  # the weights, or what has become of them, and their sampler are in files
            return {}
        path = self._save(model, job, part, f"@{job.number:08d}", request)
        id_ = self.add_sampler(session_of(model.id), request.get("sampling_session_seq_id") or 0, path)
        for folder in sorted((model.folder / part).glob("@*"))[:-UNNAMED]:
            self._release(model.path_of(part, folder.name))
            with self._saved, suppress(FileNotFoundError):  # a client may have deleted it
                _remove(folder)
        return {"sampling_session_id": id_}

    def _release(self, path: str) -> None:
        """Remove what samplers of these weights were asked, and its results."""
        with self._mutex:
            for job in list(self.jobs.values()):
                is_of_path = isinstance(job.owner, SamplingSession) and job.owner.path == path
                if is_of_path and job.done.is_set():
                    job.owner.files.remove(job.number)
                    del self.jobs[job.request_id]

    def _save(self, model: Model, job: Job, part: str, name: str, request: Mapping[str, Any]) -> str:
        """Save weights, and for `weights` AdamW's moments, under a name; return their path."""
        if not (NAME.fullmatch(name) or name == f"@{job.number:08d}"):
            raise Refused(f"path={name!r:.120}: a name has letters, digits and . _ - alone, 100 at most")
        folder = model.folder / part / name
        if not job.again:
            if folder.exists() and not request.get("overwrite") and _number(folder) != job.number:
                why = "a state of this name exists; choose another, or overwrite=True"
                if part == "sampler_weights":
                    why = "weights of this name exist, and samplers may have them; choose another name"
                raise Refused(f"path={name!r}: {why}")
            self._write(model, folder, job.number, optimizer=part == "weights")
        return model.path_of(part, name)

    def _learner(self, model: Model) -> Learner:
        if model.learner is None:
            raise Refused(f"model {model.id} could not be made; see its first request's error")
        return model.learner

    # ---- states --------------------------------------------------------------------------------------------------

    def _write(self, model: Model, folder: Path, number: int, *, optimizer: bool = True) -> None:
        tensors = state_of(self._learner(model), optimizer=optimizer)
        assert model.spec is not None
        folder.parent.mkdir(exist_ok=True)
        with self._saved, write_folder(folder) as partial:
            partial.mkdir()
            tensor_files.write(tensors, partial)
            sums = {"files": {file.name: size_and_hash(file) for file in partial.iterdir()}}
            (partial / "spec.json").write_text(json.dumps(asdict(model.spec) | {"number": number} | sums))

    def _keep_state(self, model: Model, job: Job) -> None:
        """Keep what is trained every KEEP_STATE_S, and at once what was loaded, since its folder may change. A state
        has no gradients, so nothing is kept while some wait, as they do after a refused step."""
        if model.learner is None or model.gradients_wait:
            return
        is_due = job.kind == "optim_step" and time.monotonic() - model.kept_at > KEEP_STATE_S
        if is_due or job.kind == "load_weights":
            self._keep_learner(model)

    def _keep_learner(self, model: Model) -> None:
        """Keep what is trained, as it is after the last request. Nothing is kept of a model that a damaged request has
        ended: the next service would go on without that request."""
        if model.damage:
            return
        self._write(model, model.folder / "state", model.last)
        model.files.forget(model.last)
        model.kept_at = time.monotonic()

    def _make_room(self, model: Model) -> None:
        """Keep the state of the model that was used least recently, and free its memory, where its owner has as many as
        may be in memory. Its next request brings it back. Raises Refused where gradients wait in all of them."""
        owner = self.owner(model.id)
        others = list(self.models.values())
        loaded = [other for other in others if other.learner is not None and self.owner(other.id) == owner]
        if len(loaded) < MOST_LOADED:
            return
        idle = [other for other in loaded if not other.gradients_wait]
        if not idle:
            raise Refused(f"gradients wait in {len(loaded)} models, and no more may be in memory; send optim_step")
        oldest = min(idle, key=lambda other: other.used_at)
        self._keep_learner(oldest)
        oldest.learner = None

    def _restore(self, model: Model) -> None:
        """The learner as the last state has it that was kept."""
        folder = model.folder / "state"
        if (folder / "spec.json").is_file():
            self._make_room(model)
            spec = spec_in(folder)
            learner = learner_of(self.base, spec)
            load_state(learner, tensors_of(folder))
            model.learner, model.spec = learner, spec  # not before: half a state would be trained on


def _fault(what: str, error: Exception) -> tuple[str, bytes]:
    """A result that says what went wrong here; standard error gets the traceback."""
    traceback.print_exception(error, file=sys.stderr)
    said = f"{what}: {type(error).__name__}: {error}; the server's standard error has more"
    return "json", json.dumps({"error": said, "category": "server"}).encode()


def _is_error(form: str, content: bytes) -> bool:
    return form == "json" and "error" in json.loads(content)


def _found(things: Mapping[str, Thing], id_: str) -> Thing:
    if id_ not in things:
        raise Unknown(f"{id_!r:.120}: there is nothing of this id here, or no longer")
    return things[id_]


def _folder_name(id_: str) -> str:
    """The name of the folder of a model or sampler. Raises Unknown unless its session is an id: a client names that,
    and with a path in it the folder would be elsewhere."""
    if not ID.fullmatch(id_):
        raise Unknown(f"{id_!r:.120}: there is no session of this id here")
    return id_.replace(":", ".")


def _number(folder: Path) -> int:
    """The number of the request after which these weights were written."""
    return int(read_json(folder / "spec.json")["number"])


def _remove(folder: Path) -> None:
    """Remove weights, all of them or nothing: no other service finds a part of them."""
    removed = folder.rename(folder.with_name(f".{folder.name}.removed"))
    shutil.rmtree(removed)


def _write_checked(path: Path, content: bytes) -> None:
    """Write a request or result with its checksum. The name of the file tells that it has one."""
    write_file(path.with_name(f"{path.name}.crc"), b"%08x\n" % zlib.crc32(content) + content)


def _content(path: Path) -> bytes:
    """The content of a request or result. Raises Refused if it is damaged. Files of version 0.2 have no checksum."""
    checked = path.with_name(f"{path.name}.crc")
    if not checked.is_file():
        return path.read_bytes()
    checksum, _, content = checked.read_bytes().partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(content):
        raise Refused(f"{path} is damaged: it is not as it was written")
    return content


def _brief(session: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a session that stays in memory. Its names and metadata may be long, so they stay on disk."""
    return {name: session[name] for name in ("owner", "at") if name in session}


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The files of a folder of requests or results with their numbers, in order."""
    return [(int(path.name.partition(".")[0]), path) for path in sorted(folder.glob("[0-9]*"))]


def check_number(name: str, number: int | None, least: int = 0) -> int:
    """The number of a request, model or sampler. Raises Refused for one that cannot be part of a file's name."""
    if number is None or not least <= number <= MOST_NUMBER:
        raise Refused(f"{name}={number}: use a number from {least} to {MOST_NUMBER}, in the order of the requests")
    return number


def session_of(id_: str) -> str:
    """The session in an id, or a path.

    >>> session_of("tinker://5f:train:0/weights/a")
    '5f'
    """
    return id_.removeprefix(SCHEME).partition(":")[0]
