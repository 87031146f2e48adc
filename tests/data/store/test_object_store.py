"""Stores in object storage: S3 against a real server on this machine, and what the URLs of the others mean."""

import urllib.request
from importlib.util import find_spec

import numpy as np
import pytest
from rich.console import Console

from mmfm_jax.cli import main
from mmfm_jax.data.feed.example import Samples
from mmfm_jax.data.feed.order import training_rows
from mmfm_jax.data.feed.pipeline import batch_checksum, local_batches
from mmfm_jax.data.feed.spec import make_spec
from mmfm_jax.data.feed.tokenizer import Tokenizer
from mmfm_jax.data.store.format import _kvstore_spec, open_kvstore
from mmfm_jax.data.store.mix import open_data
from mmfm_jax.data.store.study_store import StudyStore
from mmfm_jax.data.store.writer import write_store
from mmfm_jax.errors import UserError
from mmfm_jax.train.loop import train
from mmfm_jax.train.start import start_or_resume


@pytest.fixture(scope="module")
def bucket():
    """`s3://studies` of a server on the loopback, and nobody's own credentials."""
    if find_spec("moto") is None:
        pytest.skip("moto is not installed (pip install 'moto[server]')")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        made = urllib.request.Request(f"http://{host}:{port}/studies", method="PUT")
        urllib.request.urlopen(made).close()
        yield "s3://studies"
    server.stop()


def first_batch(data, inputs):
    store = open_data(data)
    tokenizer = Tokenizer.train(store.texts(store.rows("train")), 300)
    samples = Samples(store, inputs, make_spec(inputs, store.schema, store.stats, tokenizer), tokenizer)
    batches = local_batches(training_rows(samples, "train", 0), 8, np.arange(8), 3, 4, 2)
    batch = next(batches)
    batches.close()
    return batch


def test_a_store_in_s3_is_the_store_of_a_folder(bucket, make_studies, schema, tmp_path):
    studies = make_studies(20, seed=1, present=0.9)
    write_store(str(tmp_path / "store"), schema, studies)
    write_store(f"{bucket}/some/store", schema, studies)
    local, remote = open_kvstore(str(tmp_path / "store")), open_kvstore(f"{bucket}/some/store")
    keys = local.list().result()
    assert sorted(keys) == sorted(remote.list().result())
    for key in keys:
        assert local.read(key).result().value == remote.read(key).result().value, key
    StudyStore.open(f"{bucket}/some/store/").verify()
    with pytest.raises(UserError, match="s3://studies/some/store: already holds a store"):
        write_store(f"{bucket}/some/store", schema, studies)
    page = tmp_path / "page.html"
    assert main(["inspect", f"{bucket}/some/store", "--out", str(page)]) is None
    assert "<html" in page.read_text()


def test_a_run_trains_on_batches_from_s3(bucket, make_experiment, make_studies, schema, tmp_path):
    studies = make_studies(24, seed=2, present=0.9)
    for study in studies[:2]:
        object.__setattr__(study, "split", "validation")
    urls = {"s3": f"{bucket}/train", "folder": str(tmp_path / "store")}
    inputs = {
        "images": {"ct": {"size": [8, 8, 8], "patch": [4, 4, 4], "window": [-1000, 1000], "crop": "random"}},
        "texts": {"report": {"length": 8}},
    }
    tasks = {"image_text": {"kind": "contrastive", "between": ["image", "text"], "width": 16}}
    experiments = {}
    for name, url in urls.items():
        write_store(url, schema, studies)
        experiments[name] = make_experiment(
            {"data.store": url, "inputs": inputs, "tasks": tasks, "train.steps": 1, "train.batch_size": 8}
        )
    one, other = (first_batch(e.data, e.inputs) for e in experiments.values())
    assert batch_checksum(one) == batch_checksum(other) and one.images["ct"].present.any()
    outcome = train(experiments["s3"], tmp_path / "run", Console(quiet=True))
    assert outcome.step == 1 and not outcome.stopped
    spec, _ = start_or_resume(
        experiments["folder"], open_data(experiments["folder"].data), tmp_path / "run", writes=True
    )
    assert set(spec.images) == {"ct"}  # the run may move from the one to the other


def test_what_is_not_in_the_bucket_is_one_sentence(bucket):
    with pytest.raises(UserError, match="s3://studies/nothing: there is no store here"):
        StudyStore.open(f"{bucket}/nothing")
    with pytest.raises(UserError, match="s3://elsewhere/store: there is no store here"):
        StudyStore.open("s3://elsewhere/store")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/a%20b/c/", {"driver": "s3", "bucket": "bucket", "path": "a b/c/", "endpoint": "http://x:1"}),
        ("s3://bucket", {"driver": "s3", "bucket": "bucket", "path": "", "endpoint": "http://x:1"}),
        ("gs://bucket/a/", "gs://bucket/a/"),
        ("memory://a", "memory://a/"),
    ],
)
def test_urls_mean_places(monkeypatch, url, expected):
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://x:1/")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    found = _kvstore_spec(url)
    assert found == (expected if isinstance(expected, str) else {**expected, "aws_region": "eu-west-3"})
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert _kvstore_spec(url) == url.rstrip("/") + "/"


def test_a_bucket_of_google_is_opened_with_its_path():
    spec = open_kvstore("gs://bucket/some/store/").spec().to_json()
    assert (spec["driver"], spec["bucket"], spec["path"]) == ("gcs", "bucket", "some/store/")
