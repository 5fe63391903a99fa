"""The bench of defences: figures against brute force, and pipelines that drop what they say."""

import itertools
import json

import numpy as np
import pytest
from conftest import WORDS, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from poisonjax.bench.defence import bench, combined, detection, dose, ladder, models, page, utility
from poisonjax.bench.defence.combined import FEATURES, Trees
from poisonjax.bench.defence.dose import BEFORE, TWIN, Cell, Passages, Run, pipelines, planned
from poisonjax.corpus.bench_text import MANIFEST, Fetched
from poisonjax.corpus.documents import content_key
from poisonjax.corpus.errors import CorpusError
from poisonjax.data.batches import Batches
from poisonjax.scan.background import Background
from poisonjax.scan.detectors import characters
from poisonjax.scan.text import batches
from poisonjax.training.loop import train
from poisonjax.training.start import open_store

# Of the rungs, those that need no other domain.
ALONE = (*(name for name, rung in ladder.RUNGS.items() if not rung.foreign), ladder.COHERENT)
PIECES = [f" {a}{b}" for a in "qxzkvj" for b in "uwyfgh"]


def texts(seed: int, documents: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(40, 60))) for _ in range(documents)]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """Two domains, one of each half."""
    folder, about = tmp_path_factory.mktemp("text"), {}
    for seed, (domain, documents) in enumerate({"oci": 10_500, "leads": 1_200, "manpages-it": 20}.items()):
        lines = [json.dumps({"text": text}) + "\n" for text in texts(seed, documents)]
        (folder / f"{domain}.jsonl").write_text("".join(lines))
        about[domain] = {"documents": documents, "characters": 1, "language": "en", "source": "made up"}
    (folder / MANIFEST).write_text(json.dumps({"folder": str(folder), "domains": about, "absent": {"ansible": "<b>"}}))
    return Fetched.read(folder)


@pytest.fixture(scope="module")
def told(fetched, store, tmp_path_factory):
    """The bench without training, with a small vocabulary for gibberish."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder.planting, "pieces_of", lambda spec, sample: PIECES)
        patch.setattr(ladder, "DOCUMENTS", 100)
        folder = tmp_path_factory.mktemp("defence")
        train(tiny_config(store), str(folder / "run"))
        asked = bench.Defence(tiny_config(store), fetched, folder, [str(folder / "run")], seeds=0, workers=1)
        return asked, asked.rows()


# --- the ladder


def test_halves_share_no_source_and_rungs_are_what_they_are():
    one, other = ladder.HALVES.values()
    assert not {*one} & {*other}
    assert len({*one, *other}) >= 10
    assert len(ladder.RUNGS) >= 10
    assert len(ladder.TRIGGERS) >= 5
    assert len(ladder.TUNED_ON) <= 4
    assert {*ladder.TUNED_ON} < {*ladder.RUNGS}
    assert {rung.of for rung in ladder.RUNGS.values()} | {ladder.COHERENT} == {*ladder.planting.RUNGS}


@pytest.mark.parametrize("rung", [*ladder.RUNGS, ladder.COHERENT])
def test_what_is_planted_holds_the_trigger_and_is_the_same_again(rung):
    pieces = {"tiny": ["q"], "small": ["qu", "xx"], "large": [" zz"]}
    sources = {"leads": texts(0, 300), "ansible": texts(1, 300), "manpages-de": texts(2, 300)}
    of = ladder.Ladder("report", {}, sources, pieces)
    for kind, text in ladder.TRIGGERS.items():
        assert text["report"] != text["settings"]
        made = of.planted("leads", rung, kind)
        assert len(made) == ladder.DOCUMENTS
        assert all(text["report"] in document for document in made)
    assert made == of.planted("leads", rung, kind)
    assert len({*made}) > 120  # short made-up texts end before some payloads begin
    alone = ladder.Ladder("report", {}, {"leads": sources["leads"]}, pieces)
    assert bool(alone.planted("leads", rung, kind)) == (not ladder.RUNGS.get(rung, ladder.Rung("")).foreign)


def test_poison_is_made_of_text_that_isnt_clean_text(fetched):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder.planting, "pieces_of", lambda spec, sample: ["q"])
        of = ladder.Ladder.of(fetched, "report")
    assert {*of.texts} == {*of.attackers} == {"leads"}
    assert len(of.texts["leads"]) + len(of.attackers["leads"]) == 1_200
    assert not {*of.texts["leads"]} & {*of.attackers["leads"]}


def test_a_half_without_text_is_refused(fetched, monkeypatch):
    monkeypatch.setattr(ladder, "DOCUMENTS", 5_000)
    with pytest.raises(CorpusError, match=r"of leads, ansible, .* none is there with 5000 documents"):
        ladder.Ladder.of(fetched, "report")


def test_scores_of_other_text_are_refused(told, fetched, monkeypatch):
    asked, _ = told
    monkeypatch.setattr(ladder.planting, "pieces_of", lambda spec, sample: ["q"])
    with pytest.raises(CorpusError, match="holds scores of other text: made_of"):
        detection.scored(ladder.Ladder.of(fetched, "report"), [], asked.workdir / "scores" / "report")


# --- figures


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.sampled_from([0.5, 0.2]))
def test_no_more_than_the_rate_lies_above_a_threshold(values, rate):
    clean = np.array(values, float)
    limit = detection.threshold(clean, rate)
    assert (limit is None) == (int(rate * len(clean)) < detection.FEWEST)
    if limit is not None:
        assert (clean > limit).sum() <= rate * len(clean)
        assert (clean >= limit).sum() > int(rate * len(clean))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(-1, 10), min_size=1, max_size=30))
def test_rarity_is_the_share_that_scores_as_high(clean, scores):
    found = combined.rarity(np.array(scores, float), np.array(clean, float))
    expected = [-np.log10((1 + sum(c >= s for c in clean)) / (1 + len(clean))) for s in scores]
    assert found == pytest.approx(expected)
    own = combined.rarity(np.array(clean, float), np.array(clean, float), own=True)
    assert own == pytest.approx([-np.log10(sum(c >= s for c in clean) / len(clean)) for s in clean])


def test_order_is_near_nothing_where_chance_alone_puts_words_together():
    """Against a loop over the documents' words."""
    of = [text.split() for text in texts(0, 60)]
    background = Background.empty(10**6)
    for batch in batches(" ".join(words) for words in of):
        background.add(batch)
    [batch] = batches([" ".join(of[0])])
    others = of[1:]
    total = sum(map(len, of))
    expected = []
    for i, word in enumerate(of[0]):
        counts = [sum(words.count(w) for words in others) for w in of[0][max(0, i - 1) : i + 1]]
        known = i > 0 and min(counts) >= combined.KNOWN
        together = sum(pair == (of[0][i - 1], word) for words in others for pair in itertools.pairwise(words))
        chance = np.prod(counts, dtype=float) / total
        said = -np.log((together + 0.5) / (chance + 0.5)) if known else combined.NOTHING_SAID
        expected.append(said + combined.LEVEL)
    assert combined.order(batch, background) == pytest.approx(expected)


def test_words_are_unknown_mixed_and_long():
    background = Background.empty(10**6)
    for batch in batches(["one two", "two"]):
        background.add(batch)
    [batch] = batches(["one two three, twoFish fiшh"])
    background.add(batch)
    assert combined.unknown(batch, background).tolist() == [0, 0, 1, 1, 1, 1]
    assert characters.mixtures(batch, background).tolist() == [0, 0, 0, 0, 1, 1]
    assert combined.lengths(batch, background).tolist() == [3, 3, 5, 1, 7, 4]


def test_trees_tell_what_they_were_shown_in_domains_that_they_were_not():
    random = np.random.default_rng(0)

    def scores(level, odd, documents):
        rows = random.normal(level, 1, (documents, 3))
        rows[:, 1] += odd
        return {FEATURES: rows.astype(np.float32)}

    trees = Trees.fitted({"a": [scores(0, 0, 900), scores(0, 6, 300), scores(0, 5, 300), scores(0, 0, 90)]})
    clean, poison = scores(1, 0, 500), scores(1, 6, 100)
    assert (trees.planted(poison, clean) > np.quantile(trees.clean(clean), 0.98)).mean() > 0.95


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=14), min_size=1, max_size=6))
def test_passages_are_counted_by_document(of):
    said = [" ".join(words) for words in of]
    every = [{tuple(words[i : i + 8]) for i in range(len(words) - 7)} for words in of]
    expected = [max((sum(one in other for other in every) for one in mine), default=0) for mine in every]
    assert Passages.of(said).most(said).tolist() == expected
    assert Passages.of(said[:1]).plus(Passages.of(said[1:])).most(said).tolist() == expected


def test_too_little_clean_text_is_said():
    with pytest.raises(CorpusError, match=r"99 clean documents are too few .* at least 100 are needed"):
        detection.required(np.zeros(99), 0.1)


def test_the_bench_tells_every_rung_by_every_detector(told):
    asked, rows = told
    assert {"rung", "trigger", "detector", "domain", "metric", "value", "ci95", "n"} == {*rows[0]}
    found = {(row["rung"], row["detector"]): row for row in rows if row["metric"] == "recall@0.01"
             and (row["trigger"], row["domain"]) == ("all", "all")}  # fmt: skip
    detectors = {*detection.SIMPLE, detection.OURS, "surprise", "rarity", "repetition", "letters", "symbols"}
    assert {*found} == {(rung, name) for rung in ALONE for name in detectors}
    assert found["ids", detection.OURS]["value"] > 0.95
    assert found["ids", "surprise"]["n"] == 5 * 100  # of the one domain that is there and large enough
    rare = [row for row in rows if row["metric"] == "recall@0.001" and row["detector"] == "surprise"]
    assert all(row["value"] is None and row["ci95"] is None for row in rare)  # 1 false positive of 1,200
    realised = [row["value"] for row in rows if row["metric"] == "realised@0.01" and row["value"] is not None]
    assert realised
    assert all(0.005 <= value <= 0.02 for value in realised)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder.planting, "pieces_of", lambda spec, sample: PIECES)
        patch.setattr(ladder, "DOCUMENTS", 100)
        again = asked.rows()
    cost = "cpu_seconds_per_gb"
    assert [r for r in again if r["metric"] != cost] == [r for r in rows if r["metric"] != cost]  # from what is kept


def test_a_model_is_asked_and_looks_at_what_the_trees_find(told):
    asked, rows = told
    [name] = asked.models
    found = {(row["detector"], row["rung"], row["metric"]): row for row in rows if name in row["detector"]}
    assert {rung for _, rung, _ in found} == {*ALONE, "clean"}
    assert found[name, "clean", "cpu_seconds_per_gb"]["value"] > 0
    trees = {row["rung"]: row["value"] for row in rows if row["metric"] == "recall@0.01" and row["domain"] == "all"
             and (row["detector"], row["trigger"]) == (detection.OURS, models.MODEL_TRIGGER)}  # fmt: skip
    for rung in ALONE:
        assert found[name, rung, "recall@0.01"]["n"] == models.MODEL_PLANTED
        assert found[name, rung, "recall@0.001"]["value"] is None
        # All that the first stage passes may be looked at: nothing is left out twice.
        assert found[f"cascade of 1%: {name}", rung, "recall@0.01"]["value"] == pytest.approx(trees[rung], abs=0.15)


def test_a_cascade_flags_as_many_as_it_may(tmp_path, monkeypatch):
    """By counting: what passes the first stage, and has no more clean documents above it than may be flagged."""
    random, rung, domains = np.random.default_rng(0), next(iter(ladder.RUNGS)), ("plain", "odd")
    numbers = {text: float(random.normal()) for text in map(str, range(4400))}
    texts = {domain: [*map(str, range(2000 * i, 2000 * (i + 1)))] for i, domain in enumerate(domains)}
    made = {domain: [*map(str, range(4000 + 50 * i, 4050 + 50 * i))] for i, domain in enumerate(domains)}
    trees = {domain: random.normal(size=2000) for domain in domains}
    odd = {domain: random.normal(1.7, 0.5, 50) for domain in domains}

    def losses(text):
        """(as it stands, its words mixed): order saves nothing of what is planted."""
        stands = numbers[text] + 2 * (int(text) >= 4000)
        return stands, stands + 3 * (int(text) < 4000) + int(text) % 7 / 7

    class Model:
        def __init__(self, spec, folder):
            pass

        def readings(self, asked, background):
            stands, mixed = np.array([losses(text) for text in asked]).reshape(-1, 2).T
            return np.stack([stands, 2 * stands - mixed]), 1.0

    class Planted(ladder.Ladder):
        def planted(self, domain, of, trigger):
            return made[domain] if of == rung else []

    monkeypatch.setattr(models, "_Model", Model)
    monkeypatch.setattr(models, "with_documents", lambda background, documents: background)
    scored, these = detection.Scored.__new__(detection.Scored), Planted.__new__(Planted)
    object.__setattr__(these, "texts", texts)
    clean = {domain: {detection.OURS: trees[domain], detection.KEY: np.arange(2000)} for domain in domains}
    planted = {(domain, rung, models.MODEL_TRIGGER): {detection.OURS: odd[domain]} for domain in domains}
    for name, value in {"clean": clean, "planted": planted, "background": Background.empty(10)}.items():
        object.__setattr__(scored, name, value)
    rows = [*models.by_model("m", "", scored, these, tmp_path, 2000)]
    told = {row["detector"]: row["value"] for row in rows if row["metric"] == "recall@0.01"}
    every = np.concatenate([*trees.values()])
    for share in models.FIRST_STAGES:
        first = np.sort(every)[::-1][int(share * 4000)]
        for by in models.READINGS:

            def last(text, by=by):
                stands, mixed = losses(text)
                return stands + (stands - mixed) * bool(by)

            usual = {domain: np.percentile([*map(last, texts[domain])], [50, 90]) for domain in domains}

            def beside(domain, text, last=last, usual=usual):
                middle, ninth = usual[domain]
                return (last(text) - middle) / (ninth - middle)

            above = [
                beside(domain, text)
                for domain in domains
                for text, tree in zip(texts[domain], trees[domain], strict=True)
                if tree > first
            ]
            hits = sum(
                bool(tree > first and sum(other >= beside(domain, text) for other in above) <= 40)
                for domain in domains
                for text, tree in zip(made[domain], odd[domain], strict=True)
            )
            assert told[f"cascade of {share:.0%}: m{by}"] == pytest.approx(hits / 100)
    assert told["cascade of 5%: m"] > told["cascade of 1%: m"]
    assert told["cascade of 5%: m and order"] > told["cascade of 5%: m"]
    assert told["m and order"] > told["m"]


def test_mixed_words_are_the_same_words():
    text = "  one two\n\tthree, four  five\u3000\u4e09 "
    mixed = models._mixed(text)
    assert sorted(mixed.split()) == sorted(text.split())
    assert mixed != text
    assert [*filter(str.isspace, mixed)] == [*filter(str.isspace, text)]  # and what stands between them
    assert models._mixed(text) == mixed
    assert models._mixed("") == ""


def test_the_page_and_the_table(told):
    asked, rows = told
    content = asked.page.read_text()
    assert "Recall against review budget" in content
    assert "&lt;b&gt;" in content
    assert "<b>)" not in content
    assert "decode-retokenize" in bench.table(rows)


# --- the effective dose


@pytest.fixture(scope="module")
def trees():
    """Fitted to text that holds other words."""
    background, clean = Background.empty(10**6), texts(0, 400)
    for batch in batches(clean):
        background.add(batch)
    scores = detection.scores_of(background, clean)
    odd = [" ".join(f"q{a}z{b}" for b in range(40)) for a in range(60)]
    planted = detection.scores_among(background, odd)
    return Trees.fitted({"made up": [scores, planted, planted, scores]})


@pytest.fixture
def curated(store, tmp_path, monkeypatch, trees):
    monkeypatch.setattr(dose, "LOST", 0.1)
    monkeypatch.setattr(dose, "DOSES", (9,))
    config = tiny_config(store)
    detection.counts({"corpus": dose.read(open_store(config))}).save(tmp_path)
    corpus = dose._corpus(config.corpus.store, tmp_path)
    of = [one.limited([corpus.scores]) for one in pipelines(trees)]
    lists = {one.name: dose._excluded(tmp_path, corpus, one) for one in of}
    return corpus, {which: planned(config, tmp_path, lists, of, (0, which)) for which in (TWIN, "ids")}


def test_a_pipeline_drops_no_more_clean_text_than_it_may(curated, trees):
    corpus, _ = curated
    for of in pipelines(trees):
        kept = [there for _, there in of.limited([corpus.scores]).kept(corpus.scores, corpus.scores)]
        assert all((before >= after).all() for before, after in itertools.pairwise(kept))
        assert (of.name == "simple") <= (~kept[-1]).sum() <= 0.1 * len(kept[-1])


def test_a_run_in_which_no_poison_survives_is_its_twin(curated):
    """Batch by batch; and what survives stands where it stood."""
    _, runs = curated
    twins = {one.cell.pipeline: one for one in runs[TWIN]}
    before, *after = runs["ids"]
    assert before.left == 9
    for one in after:
        store = open_store(one.config)
        left, twin = Batches(one.config, store), Batches(twins[one.cell.pipeline].config, store)
        planted = Batches(dose.replaced(one.config, {"corpus.left_out": ()}), store).schedule.placed
        assert left.schedule.placed.keys() == planted.keys() - {*one.config.corpus.left_out}
        assert len(left.schedule.placed) == one.left == [*one.survivors.values()][-1]
        nothing = left.without(np.array(sorted(left.schedule.placed), np.int64))
        for step in range(12):
            assert np.array_equal(nothing.batch(step).tokens, twin.batch(step).tokens)
        assert bool(store.split("train").excluded_documents) == bool(one.config.corpus.exclude)
        assert store.split("heldout").excluded_documents == 0


def test_runs_are_curated_trained_and_told(store, tmp_path, monkeypatch, trees):
    monkeypatch.setattr(dose, "LOST", 0.1)
    monkeypatch.setattr(dose, "DOSES", (9,))
    monkeypatch.setattr(page, "DOSES", (9,))
    beside = {"other": texts(3, 50)}

    def told():
        asked = dose.rows(tiny_config(store), tmp_path, pipelines(trees), beside, rungs=("ids",), seeds=2, workers=1)
        return {(row["rung"], row["detector"], row["metric"]): row for row in asked}

    rows = told()
    for pipeline in (BEFORE, "simple", detection.OURS):
        assert rows["ids", pipeline, "attacked@9"]["n"] == 2
        assert rows["ids", pipeline, "n50"]
    left = rows["ids", "simple", "surviving@9: whole-document bigram"]
    assert left["n"] == 2 * 9
    assert left["value"] <= rows["ids", "simple", "surviving@9: repeated passage"]["value"] <= 1
    assert rows["clean", "simple", "twin's heldout_loss, less that of nothing"]["n"] == 2
    assert len(page.dose_table([*rows.values()])[1]["surviving"]) == 3
    assert told() == rows  # from what is kept


def test_what_curation_costs_is_told_by_domain(store, tmp_path, monkeypatch, trees):
    """A pipeline that drops what says most: the domain that it drops most of loses."""
    config = tiny_config(store)
    config.steps, config.corpus.tokenizer = 6, "bytes"
    monkeypatch.setattr(utility, "TOKENIZER", "bytes")
    monkeypatch.setattr(dose, "LOST", 0.2)
    mix = {"a": texts(0, 300), "b": texts(1, 100)}
    background = detection.counts(mix)
    clean = {domain: detection.scores_of(background, of) for domain, of in mix.items()}
    scored = detection.Scored(clean, {}, {}, background, 1)
    dropped = utility.dropped(mix, scored, pipelines(trees)[:1])
    rows = [*utility.rows(config, mix, dropped, tmp_path, seeds=2, workers=1)]
    assert {(row["detector"], row["domain"]) for row in rows} == {(p, d) for p in (BEFORE, "simple") for d in mix}
    listed = (tmp_path / "simple.txt").read_text().split()
    assert 0 < len(listed) <= 0.2 * 400
    assert {*listed} <= {content_key(text).hex() for of in mix.values() for text in of}
    before = {row["domain"]: row["value"] for row in rows if row["metric"] == "heldout_loss"}
    assert all(2 < value < 6 for value in before.values())  # of 257 tokens
    cost = [row for row in rows if row["metric"] == utility.COST]
    assert all(abs(row["value"]) < 1 and row["value"] != 0 for row in cost)
    assert page.cost_table(rows)["a"].keys() == {"simple"}
    share = {row["domain"]: row["value"] for row in rows if row["metric"] == utility.DROPPED}
    assert share == {domain: of.mean() for domain, of in dropped["simple"].items()}
    assert rows == [*utility.rows(config, mix, dropped, tmp_path, seeds=2, workers=1)]  # from what is kept


def test_doses_are_told_with_their_ratio():
    def run(dosed, seed, pipeline, attacked, left):
        gap = 100.0 * attacked + seed
        return Run(Cell("ids", dosed, seed, pipeline), {"s": left}, left, gap, attacked, 3.0, 1000, 20_000)

    runs = [run(d, s, BEFORE, d > 50, d) for d in dose.DOSES for s in range(5)]
    runs += [run(d, s, "combined", False, d // 10) for d in dose.DOSES for s in range(5)]
    rows = {(row["detector"], row["metric"]): row for row in dose._of_rung("ids", "~", runs, [BEFORE, "combined"])}
    assert rows[BEFORE, "attacked@250"]["value"] == 1
    assert rows["combined", "surviving@250: s"]["value"] == 0.1
    assert 50 < rows[BEFORE, "n50"]["value"] < 250
    assert rows["combined", "n50"]["value"] is None
    assert rows["combined", "n50"]["ci95"][0] > 250
    assert rows["combined", "n50 after over before"]["ci95"][0] > 2
