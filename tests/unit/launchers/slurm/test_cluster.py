"""Cluster files: the shipped examples load; what is wrong is said with key, value and remedy."""

from pathlib import Path

import pytest

from launchers.slurm.cluster import ClusterConfig, load_cluster, memory_bytes, seconds, split_overrides
from pipeline.config.errors import ConfigError
from pipeline.config.load import PACKAGED

EXAMPLES = sorted((PACKAGED / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path):
    assert isinstance(load_cluster(path), ClusterConfig)


def test_there_is_an_example_of_every_runtime():
    assert {load_cluster(path).container.runtime for path in EXAMPLES} == {"none", "pyxis", "apptainer"}


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("acount=x", "acount", "did you mean account?"),
        ("account=a b", "account", "not a name"),
        ("nodes=-1", "nodes", "at least 0"),
        ("nodes=two", "nodes", "give an integer"),
        ("scratch=runs", "scratch", "not an absolute path"),
        ("walltime='4 hours'", "walltime", "hours:minutes:seconds"),
        ("walltime='00:05:00'", "save_before_s", "not between 30 and walltime"),
        ("save_before_s=10", "save_before_s", "not between 30"),
        ("container.runtime=docker", "container.runtime", "none, pyxis, apptainer"),
        ("container.runtime=pyxis", "container.image", "give both"),
        ("container.mounts=[data:/data]", "container.mounts", "absolute"),
        ("env={WANDB_API_KEY: x}", "env", "move WANDB_API_KEY to `secrets`"),
        ("env={PGPASS: x}", "env", "move PGPASS to `secrets`"),
        ("env={AWS_CREDENTIALS: x}", "env", "move AWS_CREDENTIALS to `secrets`"),
        ("env={https_proxy: 'http://me:hunter2@proxy:3128'}", "env", "move https_proxy to `secrets`"),
        ("env={ALERTS: 'https://hooks.example.org/T0/B1'}", "env", "move ALERTS to `secrets`"),
        ('qos="a\\ntouch /tmp/x"', "qos", "on one line"),
        ('constraint="a\\nb"', "constraint", "on one line"),
        ('memory_per_node="1G\\nb"', "memory_per_node", "on one line"),
        ("memory_per_node=lots", "memory_per_node", "write e.g. 200G, or 0"),
        ('sbatch={reservation: "a\\nb"}', "sbatch.reservation", "on one line"),
        ('sbatch={"a\\nb": c}', "sbatch.a\nb", "on one line"),
        ('container.mounts=["/a:/b\\nc"]', "container.mounts", "on one line"),
        ("secrets=['A B']", "secrets", "not the name"),
        ("chain=3", "chain", "set requeue: false"),
        ("exclusive=false", "cpus_per_node", "shared node"),
        ("python=/opt/bin/run", "python", "interpreter"),
        ("ssh={host: login, user: me}", "ssh", "absolute job_dir"),
        ("ssh={host: login, user: me, job_dir: /home/a b}", "ssh.job_dir", "without spaces"),
        ("ssh={host: login, user: me, job_dir: /home/a, port: 70000}", "ssh.port", "at most 65535"),
        ("ssh={host: login, user: me, job_dir: /home/a, identity: /nowhere/key}", "ssh.identity", "no such file"),
        ("gpu_link_gb_s=0", "gpu_link_gb_s", "at least 0.001"),
    ],
)
def test_problems_name_key_and_remedy(override, key, said):
    with pytest.raises(ConfigError) as error:
        load_cluster(Path("cluster/plain.yaml"), [override])
    problem = next(problem for problem in error.value.problems if problem.key == key)
    assert said in problem.render()


def test_required_keys_are_asked_for(tmp_path):
    (tmp_path / "empty.yaml").write_text("nodes: 1\n")
    with pytest.raises(ConfigError) as error:
        load_cluster(tmp_path / "empty.yaml")
    assert {problem.key for problem in error.value.problems} == {"account", "partition", "scratch"}


@pytest.mark.parametrize(("text", "value"), [("00:01:00", 60), ("100:00:01", 360001), ("2-03:04:05", 183845)])
def test_seconds(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("2048", 2 << 30), ("3M", 3 << 20), ("200G", 200 << 30), ("1tb", 1 << 40)]
)
def test_memory(text, value):
    assert memory_bytes(text) == value
    assert load_cluster(Path("cluster/plain.yaml"), [f"memory_per_node='{text}'"]).memory_per_node == text


def test_overrides_are_told_apart():
    assert split_overrides(["steps=3", "cluster.nodes=2"]) == (["steps=3"], ["nodes=2"])
