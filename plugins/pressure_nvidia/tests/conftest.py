"""A stand-in for the driver's library, built once per session."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Two GPUs of 16 GiB. FAKE_INIT, FAKE_OPEN_<index> and FAKE_MEMORY_<index> make a call return that
# status; FAKE_USED_<index> is in GiB. With FAKE_MIG, GPU 1 is cut into slices 0 and 2 of three
# places, tells its own memory to nobody, and slices are GPUs 10 and 12.
STAND_IN = r"""
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

typedef struct { unsigned index; } device_t;
typedef struct { unsigned long long total, free, used; } memory_t;
static device_t devices[13];
static int users = 0;

static int number(const char *name, unsigned index, int otherwise) {
    char full[32];
    snprintf(full, sizeof full, name, index);
    const char *value = getenv(full);
    return value ? atoi(value) : otherwise;
}
static device_t *device(unsigned index) { devices[index].index = index; return &devices[index]; }
static int is_cut(unsigned index) { return index == 1 && getenv("FAKE_MIG") != NULL; }

int fake_users(void) { return users; }
int nvmlInitWithFlags(unsigned flags) {
    int s = number("FAKE_INIT", 0, 0);
    if (s == 0) users++;
    return s;
}
int nvmlShutdown(void) { if (users == 0) return 1; users--; return 0; }
const char *nvmlErrorString(int s) { return s == 15 ? "GPU is lost" : "some NVML error"; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    if (users == 0) return 1;
    *count = number("FAKE_COUNT", 0, 2);
    return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t **out) {
    if (users == 0) return 1;
    if (index >= 2) return 2;
    *out = device(index);
    return number("FAKE_OPEN_%u", index, 0);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **out) {
    if (users == 0) return 1;
    if (strcmp(uuid, "GPU-one") == 0) { *out = device(1); return 0; }
    if (strcmp(uuid, "MIG-two") == 0 && is_cut(1)) { *out = device(12); return 0; }
    return 6;
}
int nvmlDeviceGetIndex(device_t *device, unsigned *index) {
    if (device->index >= 10) return 3;
    *index = device->index;
    return 0;
}
int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *out) {
    unsigned index = device->index;
    if (users == 0) return 1;
    int failed = number("FAKE_MEMORY_%u", index, is_cut(index) ? 4 : 0);
    if (failed) return failed;
    out->total = (index >= 10 ? 4ull : 16ull) << 30;
    out->used = (unsigned long long)number("FAKE_USED_%u", index, 1 + index % 10) << 30;
    out->free = out->total - out->used;
    return 0;
}
#ifndef WITHOUT_MIG
int nvmlDeviceGetMigMode(device_t *device, unsigned *current, unsigned *pending) {
    if (getenv("FAKE_MIG") == NULL) return 3;
    *current = *pending = is_cut(device->index);
    return 0;
}
int nvmlDeviceGetMaxMigDeviceCount(device_t *device, unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(device_t *parent, unsigned index, device_t **out) {
    if (index == 1 || strcmp(getenv("FAKE_MIG"), "hidden") == 0) return 6;
    *out = device(10 + index);
    return 0;
}
#endif
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-in for libnvidia-ml.so.1."""
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def old_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a driver from before MIG."""
    return build(tmp_path_factory.mktemp("driver"), "-DWITHOUT_MIG")


def build(folder: Path, *options: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for the driver's library with")
    if sys.platform != "linux":
        pytest.skip("the driver's library is found by name on Linux only")
    source = folder / "nvml.c"
    source.write_text(STAND_IN)
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", *options, "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder
