"""Facts hold exactly as long as the file is the same, whatever happens to the index files."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from random import Random

import pytest

from library.data.scan import index
from library.data.scan.index import FileIndex
from library.runtime.logs import LOGGER

ROOT = Path(__file__).resolve().parents[3]
PLENTY = index.MANY + 100


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "kept" / "index"


@pytest.fixture
def log(caplog):
    LOGGER.propagate = True
    caplog.set_level(logging.INFO, LOGGER.name)
    return caplog


def write(path, text, age=100.0):
    """Writes a file that was last changed `age` seconds ago."""
    path.write_text(text, encoding="utf-8")
    changed = time.time_ns() - int(age * 1e9)
    os.utime(path, ns=(changed, changed))
    return path


class Reader:
    """Reads files, and counts: what is computed and what is known shows from outside only in that."""

    def __init__(self):
        self.read = []

    def __call__(self, path):
        self.read.append(path.name)
        return path.read_text(encoding="utf-8")

    def taken(self):
        names, self.read = sorted(self.read), []
        return names


def learn(place, kind, files, compute):
    """One run: lists the folders, learns, saves."""
    facts = FileIndex(place)
    for parent in {file.parent for file in files}:
        facts.listing(parent)
    values = facts.learn(kind, files, compute)
    facts.save()
    return values


def test_listing_has_size_and_time_of_files_only(folder):
    write(folder / "a.png", "12345")
    write(folder / "ü.txt", "")
    (folder / "sub").mkdir()
    stat = os.stat(folder / "a.png")
    listing = FileIndex(None).listing(folder)
    assert sorted(listing) == ["a.png", "ü.txt"]
    assert listing["a.png"] == (5, stat.st_mtime_ns)


def test_listing_follows_links(folder, tmp_path):
    target = write(tmp_path / "target.png", "1234567")
    try:
        (folder / "file").symlink_to(target)
        (folder / "nowhere").symlink_to(tmp_path / "missing")
        (folder / "folder").symlink_to(tmp_path)
    except OSError:
        pytest.skip("this system lets us make no links")
    facts = FileIndex(None)
    assert facts.listing(folder) == {"file": (7, os.stat(target).st_mtime_ns), "nowhere": (0, 0)}
    assert facts.stamp(folder / "nowhere") is None


def test_a_run_lists_a_folder_once(folder):
    write(folder / "a.png", "1")
    facts = FileIndex(None)
    first = facts.listing(folder)
    write(folder / "b.png", "1")
    assert facts.listing(folder / ".." / folder.name) == first
    assert sorted(FileIndex(None).listing(folder)) == ["a.png", "b.png"]


def test_listing_a_missing_folder_is_an_error(folder):
    with pytest.raises(FileNotFoundError):
        FileIndex(None).listing(folder / "missing")


@pytest.mark.parametrize("listed", [False, True])
def test_stamp(folder, listed):
    file = write(folder / "a.png", "12345")
    facts = FileIndex(None)
    if listed:
        facts.listing(folder)
    assert facts.stamp(file) == (5, os.stat(file).st_mtime_ns)
    assert facts.stamp(folder / "missing") is None
    assert facts.stamp(folder) is None
    assert facts.stamp(folder / "missing" / "a.png") is None
    later = write(folder / "later.png", "123")
    assert facts.stamp(later) == (3, os.stat(later).st_mtime_ns)


def test_facts_are_kept_between_runs(folder, place):
    files = [write(folder / f"{number}.txt", f"text {number}") for number in range(5)]
    reader = Reader()
    for taken in ([file.name for file in files], [], []):
        assert learn(place, "text", files, reader) == [f"text {number}" for number in range(5)]
        assert reader.taken() == taken
    assert learn(place, "length", files, lambda path: len(reader(path))) == [6] * 5
    assert reader.taken() == [file.name for file in files]


def test_without_a_place_nothing_is_written(folder, tmp_path):
    file = write(folder / "a.txt", "a")
    reader = Reader()
    facts = FileIndex(None)
    assert facts.learn("text", [file], reader) == facts.learn("text", [file], reader) == ["a"]
    facts.save()
    assert reader.taken() == ["a.txt"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_given_twice_is_read_once(folder):
    a, b = write(folder / "a.txt", "a"), write(folder / "b.txt", "b")
    reader = Reader()
    assert FileIndex(None).learn("text", [a, b, a, folder / ".." / folder.name / "a.txt"], reader) == [
        "a",
        "b",
        "a",
        "a",
    ]
    assert reader.taken() == ["a.txt", "b.txt"]


def test_values_are_the_same_when_kept(folder, place):
    """JSON has no tuples: what is a list in the second run must be one in the first."""
    file = write(folder / "a.txt", "a")
    value = ({"ö": (1, 2.5, None, True)}, "\ud83d", "\n")
    first = learn(place, "odd", [file], lambda path: value)
    assert first == learn(place, "odd", [file], lambda path: pytest.fail("it is known"))
    assert first == [[{"ö": [1, 2.5, None, True]}, "\ud83d", "\n"]]


@pytest.mark.parametrize("change", ["longer", "later", "earlier"])
def test_a_changed_file_loses_all_its_facts(folder, place, change):
    file, other = write(folder / "a.txt", "a", age=100), write(folder / "b.txt", "b")
    reader = Reader()
    for kind in ("text", "again"):
        learn(place, kind, [file, other], reader)
    reader.taken()
    stat = os.stat(file)
    if change == "longer":
        file.write_text("aa", encoding="utf-8")
        os.utime(file, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    else:
        write(file, "x", age=50 if change == "later" else 200)
    for kind in ("text", "again"):
        assert learn(place, kind, [file, other], reader) == [file.read_text(), "b"]
        assert reader.taken() == ["a.txt"]


@pytest.mark.parametrize("age", [0.0, 1.5, -60.0])
def test_facts_about_a_file_just_written_are_for_this_run_only(folder, place, age):
    """It may change again within the same tick of a coarse clock; a file server's clock may be ahead of ours."""
    file = write(folder / "a.txt", "old", age)
    stat = os.stat(file)
    facts, reader = FileIndex(place), Reader()
    assert facts.learn("text", [file], reader) == facts.learn("text", [file], reader) == ["old"]
    assert reader.taken() == ["a.txt"]
    facts.save()
    file.write_text("new", encoding="utf-8")
    os.utime(file, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert learn(place, "text", [file], reader) == ["new"]


def test_a_date_far_in_the_future_is_no_obstacle(folder, place):
    """A camera with a wrong clock: any change would bring the date back to today."""
    file = write(folder / "a.txt", "a", age=-400 * 24 * 3600)
    reader = Reader()
    learn(place, "text", [file], reader)
    learn(place, "text", [file], reader)
    assert reader.taken() == ["a.txt"]


def test_missing_files_are_computed_each_time(folder, place):
    facts = FileIndex(place)
    asked = []
    for _ in range(2):
        assert facts.learn("there", [folder / "a"], lambda path: asked.append(path) or path.exists()) == [False]
    assert asked == [folder / "a"] * 2
    with pytest.raises(FileNotFoundError):
        facts.learn("text", [folder / "a"], Reader())
    facts.put("text", folder / "a", "never there")
    facts.save()
    assert not place.exists()


def entries(place):
    return {name for file in place.iterdir() for name in json.loads(index.unseal(file.read_bytes()))["files"]}


@pytest.mark.parametrize("listed", [False, True])
def test_files_that_are_gone_are_dropped_if_the_folder_was_listed(folder, place, listed):
    files = [write(folder / name, name) for name in ("a.txt", "b.txt", "c.txt")]
    learn(place, "text", files, Reader())
    files[0].unlink()
    facts = FileIndex(place)
    if listed:
        facts.listing(folder)
    facts.learn("text", files[1:2], Reader())
    facts.save()
    assert entries(place) == ({"b.txt", "c.txt"} if listed else {"a.txt", "b.txt", "c.txt"})


def test_save_without_news_does_not_write(folder, place):
    file = write(folder / "a.txt", "a")
    learn(place, "text", [file], Reader())
    (kept,) = place.iterdir()
    os.utime(kept, ns=(1, 1))
    learn(place, "text", [file], Reader())
    assert os.stat(kept).st_mtime_ns == 1


def test_put(folder, place):
    old, fresh = write(folder / "old.txt", "1"), write(folder / "fresh.txt", "1", age=0)
    facts, reader = FileIndex(place), Reader()
    for file in (old, fresh):
        facts.put("text", file, ("put",))
    assert facts.learn("text", [old, fresh], reader) == [["put"], ["put"]]
    facts.save()
    assert learn(place, "text", [old, fresh], reader) == [["put"], "1"]
    assert reader.taken() == ["fresh.txt"]


@pytest.mark.parametrize("age", [0.0, 50.0])
def test_put_after_a_change_in_the_run(folder, place, age):
    """Nobody can tell whether the value is of the old bytes or of the new ones, so it isn't kept."""
    file = write(folder / "a.txt", "old")
    learn(place, "text", [file], Reader())
    facts, reader = FileIndex(place), Reader()
    facts.listing(folder)
    write(file, "newer", age)
    facts.put("length", file, 5)
    assert facts.stamp(file) == (5, os.stat(file).st_mtime_ns)
    assert facts.learn("text", [file], reader) == ["newer"]
    assert facts.learn("length", [file], reader) == [5]
    facts.save()
    assert learn(place, "length", [file], lambda path: "anew") == ["anew"]


def test_put_for_a_file_removed_in_the_run(folder, place):
    file = write(folder / "a.txt", "a")
    learn(place, "text", [file], Reader())
    facts = FileIndex(place)
    facts.listing(folder)
    file.unlink()
    facts.put("text", file, "b")
    facts.save()
    assert entries(place) == set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00" * len(text),
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace(f'"version":{index.VERSION}', f'"version":{index.VERSION + 1}'),
        lambda text: text.replace("images", "others"),
        lambda text: json.dumps({**json.loads(text), "files": []}),
        lambda text: json.dumps({**json.loads(text), "kinds": "text"}),
        lambda text: json.dumps({**json.loads(text), "kinds": []}),
        lambda text: json.dumps({**json.loads(text), "files": {"a.txt": [1]}}),
        lambda text: json.dumps({**json.loads(text), "files": {"a.txt": ["1", 2, 0, "a"]}}),
        lambda text: json.dumps({**json.loads(text), "files": {"a.txt": [1, 2, 0]}}),
        lambda text: json.dumps({**json.loads(text), "files": {"a.txt": [1, 2, "text", "a"]}}),
        lambda text: json.dumps({**json.loads(text), "files": {"a.txt": [1, 2, -1, "a"]}}),
    ],
)
def test_a_damaged_or_foreign_index_is_built_again(folder, place, log, damage):
    file = write(folder / "a.txt", "a")
    reader = Reader()
    learn(place, "text", [file], reader)
    (kept,) = place.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(index.seal(damage(index.unseal(whole).decode()).encode()))
    assert learn(place, "text", [file], reader) == ["a"]
    assert reader.taken() == ["a.txt"] * 2
    assert kept.read_bytes() == whole
    assert [record.levelno for record in log.records] == [logging.INFO]


def test_one_wrong_byte_anywhere_is_found(folder, place):
    file = write(folder / "a.txt", "a caption")
    reader = Reader()
    learn(place, "text", [file], reader)
    (kept,) = place.iterdir()
    whole = kept.read_bytes()
    assert b"a caption" in whole
    for position in range(len(whole)):
        kept.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert learn(place, "text", [file], reader) == ["a caption"]
    assert len(reader.taken()) == 1 + len(whole)


def test_a_place_that_cannot_be_written_warns_once(folder, tmp_path, log):
    file = write(folder / "a.txt", "a")
    (tmp_path / "file").write_text("")
    facts = FileIndex(tmp_path / "file" / "index")
    for kind in ("one", "two"):
        assert facts.learn(kind, [file], Reader()) == ["a"]
        facts.save()
    (record,) = log.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "file") in record.getMessage()


def test_a_folder_that_vanishes_in_the_run_is_no_obstacle(folder, place):
    file = write(folder / "a.txt", "a")
    facts = FileIndex(place)
    facts.learn("text", [file], Reader())
    file.unlink()
    folder.rmdir()
    facts.save()
    assert entries(place) == {"a.txt"}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode on this system")
def test_names_that_are_not_unicode(folder, place):
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xe9"))
    strange.mkdir()
    file = write(strange / os.fsdecode(b"\xfe.txt"), "a")
    reader = Reader()
    for _ in range(2):
        assert learn(place, "text", [file], reader) == ["a"]
    assert len(reader.taken()) == 1


def test_folders_are_known_by_any_of_their_paths(folder, place, monkeypatch):
    file = write(folder / "a.txt", "a")
    reader = Reader()
    learn(place, "text", [file], reader)
    monkeypatch.chdir(folder)
    assert FileIndex(place).learn("text", [Path("a.txt")], reader) == ["a"]
    assert FileIndex(place).learn("text", [Path("../images/a.txt")], reader) == ["a"]
    assert reader.taken() == ["a.txt"]


# ---- many files, and other processes


@pytest.fixture
def crowd(folder):
    changed = time.time() - 100
    files = [folder / f"{number:05d}.txt" for number in range(PLENTY)]
    for number, file in enumerate(files):
        file.write_bytes(str(number).encode())
        os.utime(file, (changed, changed))
    return files


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(index, "available_cores", lambda: 2)


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    """A module that worker processes can import as well."""
    source = """
        import os

        class Refused(Exception):
            def __init__(self, file, *, reason):  # cannot be sent between processes
                super().__init__(reason)
                self.file = file

        def who(path):
            return [os.getpid(), int(path.read_bytes())]

        def refuse(path, number):
            if int(path.read_bytes()) == number:
                raise Refused(path, reason="no")
            return number

        def die(path, parent):
            if os.getpid() != parent:
                os._exit(1)
            return int(path.read_bytes())

        def learn(files, queue):
            from library.data.scan import index

            index.available_cores = lambda: 2
            queue.put((index.FileIndex(None).learn("who", files, who), os.getpid()))
    """
    (tmp_path / "index_helpers.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    return __import__("index_helpers")


def test_many_files_are_read_in_other_processes_with_a_bar(crowd, place, helpers, two_cores, capfd):
    found = learn(place, "who", crowd, helpers.who)
    assert [number for _, number in found] == list(range(PLENTY))
    assert os.getpid() not in {process for process, _ in found}
    assert f"{PLENTY}/{PLENTY}" in capfd.readouterr().err
    assert learn(place, "who", crowd, None) == found
    assert capfd.readouterr().err == ""


def test_few_files_are_read_in_this_process_without_a_bar(crowd, place, helpers, two_cores, capfd):
    found = learn(place, "who", crowd[: index.MANY - 1], helpers.who)
    assert {process for process, _ in found} == {os.getpid()}
    assert [number for _, number in found] == list(range(index.MANY - 1))
    assert capfd.readouterr().err == ""


def test_what_cannot_be_sent_to_processes_runs_in_threads(crowd, two_cores):
    pid = os.getpid()
    found = FileIndex(None).learn("who", crowd, lambda path: [os.getpid() == pid, int(path.read_bytes())])
    assert found == [[True, number] for number in range(PLENTY)]


@pytest.mark.parametrize("count", [50, PLENTY])
def test_an_exception_arrives_as_it_is_and_what_was_learnt_stays(crowd, place, helpers, two_cores, count):
    facts = FileIndex(place)
    with pytest.raises(helpers.Refused, match="no") as caught:
        facts.learn("number", crowd[:count], partial(helpers.refuse, number=count - 1))
    assert caught.value.file == crowd[count - 1]
    facts.save()
    assert crowd[0].name in entries(place)
    assert crowd[count - 1].name not in entries(place)


def test_workers_that_die_are_replaced_by_threads(crowd, helpers, two_cores):
    compute = partial(helpers.die, parent=os.getpid())
    assert FileIndex(None).learn("number", crowd, compute) == list(range(PLENTY))


def test_a_daemonic_process_reads_in_threads(crowd, helpers):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=helpers.learn, args=(crowd, queue), daemon=True)
    process.start()
    found, pid = queue.get(timeout=60)
    process.join()
    assert found == [[pid, number] for number in range(PLENTY)]
    assert pid != os.getpid()


@pytest.mark.parametrize("guard", ["", "if __name__ == '__main__':\n    "])
def test_a_script_with_or_without_a_main_guard(crowd, helpers, tmp_path, guard):
    """Without one, each worker would run the script again; it must not get to do more than start."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, os\nfrom pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "import index_helpers\nfrom library.data.scan import index\nindex.available_cores = lambda: 2\n"
        f"files = sorted(Path({str(crowd[0].parent)!r}).iterdir())\n"
        f"{guard}found = index.FileIndex(None).learn('who', files, index_helpers.who); "
        "print(len(found), len({process for process, _ in found} - {os.getpid()}) > 0)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(PLENTY), str(guard != "")]


def test_many_writers_and_readers_see_whole_files(folder, place):
    """Writers keep different facts at the same time; whoever reads finds a whole index of one of them."""
    files = [write(folder / f"{number}.txt", "x" * 50) for number in range(300)]
    learn(place, "text", files, Reader())
    script = (
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from library.data.scan.index import FileIndex\n"
        f"files = sorted(Path({str(folder)!r}).iterdir())\n"
        "for turn in range(40):\n"
        f"    facts = FileIndex(Path({str(place)!r}))\n"
        "    for file in files: facts.put(sys.argv[1], file, turn)\n"
        "    facts.save()\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, name]) for name in ("one", "two")]
    (kept,) = (file for file in place.iterdir() if file.suffix == ".json")
    looked = 0
    while any(writer.poll() is None for writer in writers):
        found = json.loads(index.unseal(kept.read_bytes()))["files"]
        assert len(found) == 300
        looked += 1
    assert [writer.wait() for writer in writers] == [0, 0]
    assert looked > 5
    assert list(place.iterdir()) == [kept]


@pytest.mark.parametrize("seed", range(15))
def test_any_history_gives_the_files_own_words(tmp_path, folder, place, seed):
    """Random writes, removals, runs and damage; a value must always be what the file says now."""
    rng = Random(seed)
    names = [f"{number}.txt" for number in range(6)]
    age = 10_000.0
    for _ in range(60):
        action, file = (
            rng.choice(["write", "write", "remove", "run", "run", "run", "damage"]),
            folder / rng.choice(names),
        )
        if action == "write":
            age -= 1  # later than all before, and long ago
            write(file, "x" * rng.randrange(3) + str(age), age)
        elif action == "remove":
            file.unlink(missing_ok=True)
        elif action == "damage" and place.exists():
            for kept in place.iterdir():
                kept.write_bytes(kept.read_bytes()[: rng.randrange(200)])
        elif action == "run":
            facts, reader = FileIndex(place), Reader()
            there = sorted(facts.listing(folder)) if rng.random() < 0.7 else sorted(os.listdir(folder))
            files = [folder / name for name in there if rng.random() < 0.8]
            for kind in rng.sample(["a", "b"], rng.randint(1, 2)):
                assert facts.learn(kind, files, reader) == [file.read_text() for file in files]
            if rng.random() < 0.8:
                facts.save()
                assert learn(place, kind, files, lambda path: pytest.fail("it is known")) is not None
