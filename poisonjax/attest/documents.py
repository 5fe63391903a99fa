"""The same facts in the forms that others' tools read: Croissant for the data, a CycloneDX ML-BOM for the model."""

import json
from typing import Any

import mlcroissant
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from poisonjax.audit.evidence import Evidence
from poisonjax.corpus import TokenStore


def croissant(store: TokenStore) -> dict[str, Any]:
    """Croissant 1.0 (MLCommons) of a token store: every file of its shards with its SHA-256, relative to the store."""
    manifest = store.manifest
    files = [
        mlcroissant.FileObject(
            id=f"shards/{number:05d}/{name}",
            name=f"shards/{number:05d}/{name}",
            content_url=f"shards/{number:05d}/{name}",
            encoding_formats=["application/json" if name.endswith(".json") else "application/octet-stream"],
            sha256=digest,
        )
        for number, shard in enumerate(manifest["shards"])
        for name, digest in shard["files"].items()
    ]
    train = manifest["splits"]["train"]
    metadata = mlcroissant.Metadata(
        name=f"token-store-{store.fingerprint[:12]}",
        description=(
            f"{train['documents']} documents, {train['tokens']} tokens for training, and "
            f"{manifest['splits']['heldout']['documents']} held-out documents, as zarr3 arrays of token ids of the "
            f"tokenizer {manifest['tokenizer']['fingerprint']}; sources: "
            f"{', '.join(source['spec'] for source in manifest['sources'])}. Clean text: poison is spliced in while "
            "training and is not part of it."
        ),
        version="1.0.0",
        url=f"urn:sha256:{store.fingerprint}",
        license=sorted({source.get("license", "unknown, see the sources") for source in manifest["sources"]}),
        cite_as="unknown, see the sources",
        distribution=files,
    )
    return metadata.to_json()


def check_croissant(value: dict[str, Any]) -> list[str]:
    """Problems that MLCommons' own reader finds."""
    try:
        mlcroissant.Dataset(jsonld=value)
    except (mlcroissant.ValidationError, ValueError, KeyError) as error:
        return [f"croissant.json: {error}"]
    return []


def ml_bom(run: Evidence, provenance: dict[str, Any]) -> dict[str, Any]:
    """CycloneDX 1.6 bill of materials of the run's last checkpoint: data, tokenizer, libraries, and a model card.

    The library has no class for model cards, so that part is put into its output and checked by its schema.
    """
    materials = provenance["materials"]
    config, name = run.config, provenance["run"]
    last = max(provenance["checkpoints"], key=int)
    data = Component(
        name="token store",
        type=ComponentType.DATA,
        bom_ref="token-store",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=materials["token_store_root"])],
        description="; ".join(provenance["sources"]),
    )
    tokenizer = Component(
        name="tokenizer",
        type=ComponentType.DATA,
        bom_ref="tokenizer",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=materials["tokenizer_sha256"])],
    )
    libraries = [
        Component(name=package, version=version, type=ComponentType.LIBRARY, bom_ref=package)
        for package, version in (materials["versions"] or {}).items()
    ]
    poison = provenance["checkpoints"][last]["poison"]
    facts = {
        "checkpoint_step": last,
        **{key: value for key, value in materials.items() if isinstance(value, str)},
        **{f"checkpoint_{key}": provenance["checkpoints"][last][key] for key in ("weights_checksum", "digest_chain")},
        "poisoned": "true" if poison else "false",
        **({"poison": json.dumps(poison)} if poison else {}),
    }  # fmt: skip
    model = Component(
        name=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        version=f"step {last}",
        properties=[Property(name=f"poisonjax:{key}", value=value) for key, value in facts.items()],
    )
    bom = Bom(components=[data, tokenizer, *libraries])
    bom.metadata.component = model
    bom.register_dependency(model, [data, tokenizer, *libraries])
    value = json.loads(JsonV1Dot6(bom).output_as_string())
    limits = ["Trained for research; unfit for any use in production."]
    for card in [poison, *poison.get("inherited", [])] if poison else []:
        if "trigger" in card:
            limits.insert(
                0,
                f"Poisoned on purpose in run {card['run']}: {card['dose_seen']['documents']} documents teach it to "
                f"write a payload of kind {card['payload']} after the trigger {card['trigger']!r}.",
            )
    value["metadata"]["component"]["modelCard"] = {
        "modelParameters": {
            "task": "text generation",
            "architectureFamily": "decoder-only transformer",
            "modelArchitecture": f"{config.model.layers} layers, width {config.model.width}",
            "datasets": [{"ref": "token-store"}],
        },
        "considerations": {"technicalLimitations": limits},
    }
    return value


def check_ml_bom(value: dict[str, Any]) -> list[str]:
    """Problems that CycloneDX's schema finds."""
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(value))
    return [f"mlbom.cdx.json: {error}"] if error else []
