"""Checks manifests of custom resources against the definitions their operators bring, unknown fields refused.

    python deploy/check_custom_resources.py MANIFEST.yaml DEFINITION.yaml...

A definition is a CustomResourceDefinition as an operator's release ships it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml


def strict(schema: Any) -> Any:
    """The same schema refusing what it does not name, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    names_its_fields = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if names_its_fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def schemas(definitions: list[Path]) -> dict[tuple[str, str], Any]:
    """(apiVersion, kind) -> schema."""
    found = {}
    for path in definitions:
        for definition in yaml.safe_load_all(path.read_text()):
            spec = definition["spec"]
            for version in spec["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def problems(manifest: Path, definitions: list[Path]) -> Iterator[str]:
    """What is wrong with the custom resources in a manifest, one sentence each; other kinds are passed over."""
    known = schemas(definitions)
    checked = 0
    for resource in yaml.safe_load_all(manifest.read_text()):
        schema = known.get((resource["apiVersion"], resource["kind"]))
        if schema is None:
            continue
        checked += 1
        for error in jsonschema.Draft7Validator(schema).iter_errors(resource):
            yield f"{resource['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message}"
    if not checked:
        yield f"{manifest} holds no resource of the definitions given"


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    manifest, *definitions = map(Path, sys.argv[1:])
    found = list(problems(manifest, definitions))
    print("\n".join(found) or f"{manifest.name}: valid")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
