/* Stands for libcuda.so.1 where there is none: one GPU of compute capability 7.5 whose memory is the host's.
 *
 * What is enqueued runs at once; kernel launches, and what a graph would replay, are told to the test, which runs them in
 * numpy (tests/emulated.py). Enough of the driver for cuda.core's devices, streams, events, buffers, graphs and launches.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Status;
typedef void *Handle;
enum { NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };
#define OK(signature) Status signature { return 0; }
#define SET(signature, place, value) Status signature { *(place) = (value); return 0; }

static void (*on_launch)(const char *entry, unsigned x, unsigned y, unsigned z, void **arguments);
static void (*on_graph)(int what, intptr_t graph); /* 0 begins, 1 ends, 2 is launched */
static intptr_t graphs, capturing;

void fake_driver_calls(void *launch, void *graph) { on_launch = launch; on_graph = graph; }

OK(cuInit(unsigned flags))
SET(cuDriverGetVersion(int *version), version, 13000)
SET(cuDeviceGetCount(int *count), count, 1)
SET(cuDeviceGet(int *device, int number), device, number)
SET(cuDeviceGetAttribute(int *value, int attribute, int device), value, attribute == 75 ? 7 : attribute == 76 ? 5 : 0)
SET(cuDevicePrimaryCtxRetain(Handle *context, int device), context, (Handle)1)
OK(cuDevicePrimaryCtxRelease_v2(int device))
OK(cuCtxSetCurrent(Handle context))
SET(cuCtxGetCurrent(Handle *context), context, (Handle)1)
SET(cuCtxGetDevice(int *device), device, 0)
Status cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "stand-in"); return 0; }
Status cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }

SET(cuStreamCreateWithPriority(Handle *stream, unsigned flags, int priority), stream, malloc(1))
OK(cuStreamDestroy_v2(Handle stream))
Status cuStreamSynchronize(Handle stream) { return capturing ? CAPTURE_UNSUPPORTED : 0; }
SET(cuStreamGetCtx(Handle stream, Handle *context), context, (Handle)1)
Status cuStreamGetCtx_v2(Handle stream, Handle *context, Handle *green) {
    *context = (Handle)1;
    if (green) *green = NULL;
    return 0;
}
SET(cuEventCreate(Handle *event, unsigned flags), event, malloc(1))
OK(cuEventDestroy_v2(Handle event))
Status cuEventRecord(Handle event, Handle stream) { return capturing ? CAPTURE_UNSUPPORTED : 0; }
OK(cuEventQuery(Handle event))
OK(cuEventSynchronize(Handle event))

static uint64_t filled(size_t size) { /* with what no test may read */
    size = (size + 255) / 256 * 256;
    return (uint64_t)memset(aligned_alloc(256, size), 0xff, size);
}
SET(cuMemAlloc_v2(uint64_t *address, size_t size), address, filled(size))
SET(cuMemAllocAsync(uint64_t *address, size_t size, Handle stream), address, filled(size))
SET(cuMemAllocHost_v2(void **address, size_t size), address, (void *)filled(size))
Status cuMemFree_v2(uint64_t address) { free((void *)address); return 0; }
Status cuMemFreeAsync(uint64_t address, Handle stream) { free((void *)address); return 0; }
Status cuMemFreeHost(void *address) { free(address); return 0; }
Status cuMemcpyAsync(uint64_t target, uint64_t source, size_t size, Handle stream) {
    if (capturing) return CAPTURE_UNSUPPORTED;
    memcpy((void *)target, (void *)source, size);
    return 0;
}
Status cuMemsetD8Async(uint64_t target, unsigned char value, size_t size, Handle stream) {
    memset((void *)target, value, size);
    return 0;
}

Status cuStreamBeginCapture_v2(Handle stream, int mode) { capturing = ++graphs; on_graph(0, capturing); return 0; }
Status cuStreamEndCapture(Handle stream, Handle *graph) {
    if (graph) *graph = (Handle)capturing;
    on_graph(1, capturing);
    capturing = 0;
    return 0;
}
Status cuStreamGetCaptureInfo_v2(Handle stream, int *status, uint64_t *id, Handle *graph, const Handle **on, size_t *n) {
    *status = capturing != 0;
    if (id) *id = capturing;
    if (graph) *graph = (Handle)capturing;
    if (n) *n = 0;
    return 0;
}
Status cuStreamGetCaptureInfo_v3(Handle stream, int *status, uint64_t *id, Handle *graph, const Handle **on,
                                 const Handle **edges, size_t *n) {
    return cuStreamGetCaptureInfo_v2(stream, status, id, graph, on, n);
}
SET(cuGraphInstantiateWithParams(Handle *exec, Handle graph, void *parameters), exec, graph)
OK(cuGraphDestroy(Handle graph))
OK(cuGraphExecDestroy(Handle exec))
Status cuGraphLaunch(Handle exec, Handle stream) { on_graph(2, (intptr_t)exec); return 0; }
SET(cuUserObjectCreate(Handle *object, void *owned, void *destroy, unsigned count, unsigned flags), object, malloc(1))
OK(cuUserObjectRelease(Handle object, unsigned count))
Status cuGraphGetNodes(Handle graph, Handle *nodes, size_t *count) { *count = 0; return 0; }
OK(cuGraphReleaseUserObject(Handle graph, Handle object, unsigned count))
OK(cuGraphRetainUserObject(Handle graph, Handle object, unsigned count, unsigned flags))

SET(cuLibraryLoadData(Handle *library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m),
    library, malloc(1))
OK(cuLibraryUnload(Handle library))
SET(cuLibraryGetKernel(Handle *kernel, Handle library, const char *entry), kernel, strdup(entry))
SET(cuKernelGetAttribute(int *value, int attribute, Handle kernel, int device), value, 0)
Status cuLaunchKernelEx(const unsigned *grid, Handle kernel, void **arguments, void **extra) {
    on_launch(kernel, grid[0], grid[1], grid[2], arguments);
    return 0;
}
SET(cuGetErrorName(Status status, const char **name), name, "error of the stand-in")
SET(cuGetErrorString(Status status, const char **text), text, "see tests/fake_driver.c")

/* The newest variant there is; capture info got an argument in CUDA 12.3. */
Status cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *found) {
    static const char *const variants[] = {"_v3", "_v2", ""};
    char variant[128];
    *function = NULL;
    for (int i = version < 12030; i < 3 && !*function; i++) {
        snprintf(variant, sizeof variant, "%s%s", name, variants[i]);
        Dl_info self;
        dladdr(&graphs, &self);
        *function = dlsym(dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD), variant);
    }
    if (found) *found = !*function;
    return *function ? 0 : NOT_FOUND;
}
