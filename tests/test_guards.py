"""Every guard of SECURITY.md, taken out: the test that stands for it fails."""

import multiprocessing
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# By test, which must fail without the guard: file of the package, text of the guard, what stands there without it.
GUARDS = {
    "data/test_image_roots.py::test_uri_reaches_no_server_of_its_own_choice": [
        ("storage/locations.py", "  _check_host(location, scheme)", "  pass"),
        ("storage/locations.py", "scheme not in schemes:", "False:"),
        ("storage/locations.py", ' and ("::" in rest or "?" in rest)', " and False"),
    ],
    "data/test_image_roots.py::test_relative_path_must_not_leave_the_folder_of_its_table": [
        ("storage/paths.py", "and leaves and not", "and False and not"),
    ],
    "data/test_image_roots.py::test_image_root_holds_for_all_paths_and_through_links": [
        ("storage/paths.py", "        if self.given:\n", "        if False:\n"),
        ("storage/paths.py", "_is_below(os.path.realpath(local), map(", "_is_below(local, map("),
    ],
    "data/test_image_roots.py::test_files_that_are_none_are_never_opened": [
        ("storage/paths.py", "if is_local and _is_below(", "if False and _is_below("),
    ],
    "data/test_image_roots.py::test_table_in_a_bucket_names_no_local_file": [
        ("storage/paths.py", "if self.folders and all(", "if False and all("),
    ],
    "models/test_model_folder_security.py::test_class_of_a_later_timm_that_loads_something_is_given_no_checkpoint": [
        ("models/extractor.py", " - _LOADING_ARGUMENTS", ""),
    ],
    "models/test_model_folder_security.py::test_folder_cannot_name_a_checkpoint_to_load": [
        ("models/extractor.py", "_check_args(config.network, args)", "pass"),
    ],
    "models/test_model_folder_security.py::test_folder_takes_plain_values_only": [
        ("models/extractor.py", "if not _is_plain(value):", "if False:"),
    ],
    "models/test_model_folder_security.py::test_folder_names_a_network_of_timm_and_no_place": [
        ("models/saving.py", "elif not timm.is_model(", "elif False and not ("),
    ],
    "models/test_model_folder_security.py::test_folder_names_no_code_of_installed_packages": [
        ("models/saving.py", 'refuse_foreign(name, "config.json")', "pass"),
        ("models/saving.py", 'refuse_foreign(name, str(path / "config.json"))', "pass"),
    ],
    "models/test_model_folder_security.py::test_command_line_cannot_either": [
        ("models/weights.py", "weights_only=True", "weights_only=False"),
    ],
    "models/test_model_folder_security.py::test_hub_is_asked_only_with_leave": [
        ("config/evaluation.py", "and not self.allow_hub", "and False"),
    ],
    "report/test_page.py::test_label_that_is_a_script_is_shown_as_text": [
        ("report/page.py", "autoescape=True", "autoescape=False"),
    ],
    "report/test_page.py::test_markup_that_slips_through_runs_no_script_and_fetches_nothing": [
        ("report/page.py", "with_policy(_template().render(page))", "_template().render(page)"),
        ("content_policy.py", "default-src 'none'", "default-src *"),
    ],
    "jobs/test_serve.py::test_refused_with_one_line_and_the_next_request_is_answered[wrong token]": [
        ("online/front.py", "if not hmac.compare_digest(", "if False and hmac.compare_digest("),
    ],
    "jobs/test_serve.py::test_interrupted_answers_what_is_under_way_and_the_cache_stays": [
        ("online/front.py", "elif not _is_this_machine(", "elif False and _is_this_machine("),
    ],
    "jobs/test_serve.py::test_refused_with_one_line_and_the_next_request_is_answered[a form]": [
        ("online/front.py", 'if request.content_type != "application/json" or', "if"),
    ],
    "jobs/test_serve.py::test_listens_on_this_machine_alone": [
        ("jobs/serve.py", "(limits.host, limits.port), family", '("", limits.port), family'),
        ("config/serving.py", 'host: str = "127.0.0.1"', 'host: str = "0.0.0.0"'),
    ],
    "jobs/test_serve.py::test_token_is_read_and_checked": [
        ("config/serving.py", "if not self.is_local:", "if False:"),
    ],
    "cluster/test_session.py::test_connect_local_starts_a_private_ray_twice_and_leaves_nothing_behind": [
        ("cluster/session.py", "    _use_own_token()\n", "    pass\n"),
        ("cluster/session.py", "_without_metrics_port() if", "nullcontext() if"),
        ("cluster/session.py", '_temp_dir=str(folder / "ray")', "_temp_dir=folder.as_posix()"),
    ],
}  # fmt: skip


class _Failures:
    """Which tests fail, by their names, and which pass."""

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self.passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.when == "call":
            self.failed.add(report.nodeid)
        if report.passed and report.when == "call":
            self.passed.add(report.nodeid)


def _tested(tree: Path, without: Sequence[tuple[str, str, str]], tests: Sequence[str]) -> _Failures:
    """What becomes of these tests in a copy of the repository with texts of files replaced; in a process of its own."""
    ignored = shutil.ignore_patterns(".git", ".venv", "out", ".pytest_cache")
    shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
    for name, text, other in without:
        file = tree / "distributed_rerank" / name
        content = file.read_text()
        assert content.count(text) == 1, f"{name} has no guard {text!r}: change the table with the code"
        file.write_text(content.replace(text, other))
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    found = _Failures()
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-n0", f"--rootdir={tree}", "-c", "pyproject.toml"]
    pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[found])
    import distributed_rerank

    assert Path(distributed_rerank.__file__).is_relative_to(tree), "another package than the copy was tested"
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_its_guard_a_promise_has_a_test_that_fails(tmp_path: Path) -> None:
    """In rounds: in each of them every file of tests stands for one guard at most, so that none hides another."""
    seen: Counter[str] = Counter()
    rounds: defaultdict[int, list[tuple[str, tuple[str, str, str]]]] = defaultdict(list)
    for test, guards in GUARDS.items():
        for guard in guards:
            test_file = test.partition("::")[0]
            rounds[seen[test_file]].append((test, guard))
            seen[test_file] += 1
    # What every process needs is imported once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "timm", "ray", "pandas", "pyarrow.parquet", "aiohttp"])
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        whole = pool.submit(_tested, tmp_path / "whole", (), list(GUARDS))
        found = [
            pool.submit(_tested, tmp_path / str(number), [guard for _, guard in group], [test for test, _ in group])
            for number, group in rounds.items()
        ]
        assert whole.result().passed, "nothing was tested"
        assert not whole.result().failed
        for group, one in zip(rounds.values(), found, strict=True):
            for test, (file, text, _) in group:
                has_failed = any(name.startswith(f"tests/{test}") for name in one.result().failed)
                assert has_failed, f"{file} without {text!r}: {test} does not fail"
