"""The generated stubs import with the pinned runtimes and hold the services, packages and options that clients rely on."""

import importlib

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor
from packaging.version import Version

FILES = ("adapter", "data_plane", "inference", "system")
RPCS = {
    "loraplane.v1.InferenceService": {"Generate"},
    "loraplane.v1.AdapterService": {
        "RegisterAdapter",
        "UploadAdapter",
        "GetAdapter",
        "ListAdapters",
        "UpdateAdapter",
        "UnregisterAdapter",
        "PinAdapter",
        "UnpinAdapter",
        "PreloadAdapter",
        "WatchAdapters",
    },
    "loraplane.v1.SystemService": {"GetServerInfo", "GetLoad", "Drain"},
    "loraplane.v1.DataPlaneService": {"Describe", "Run"},
}


def descriptor(name: str) -> FileDescriptor:
    module = importlib.import_module(f"protos.loraplane.v1.{name}_pb2")
    assert isinstance(module.DESCRIPTOR, FileDescriptor)
    return module.DESCRIPTOR


@pytest.mark.parametrize("name", FILES)
def test_stubs_import_and_name_their_package(name: str) -> None:
    importlib.import_module(f"protos.loraplane.v1.{name}_pb2_grpc")
    file = descriptor(name)
    assert file.package == "loraplane.v1"
    options = file.GetOptions()
    assert options.go_package and options.java_package == "loraplane.v1" and options.java_multiple_files


def test_services_are_those_of_the_contract() -> None:
    found = {
        service.full_name: {method.name for method in service.methods}
        for name in FILES
        for service in descriptor(name).services_by_name.values()
    }
    assert found == RPCS


@pytest.mark.parametrize("name", FILES)
def test_zero_of_every_enum_means_unspecified(name: str) -> None:
    for enum in descriptor(name).enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), enum.full_name


def test_runtimes_are_new_enough_for_the_stubs() -> None:
    import google.protobuf

    assert Version(grpc.__version__) >= Version("1.84.0")
    assert Version(google.protobuf.__version__) >= Version("7.35.1")
