// The CUDA runtime, as far as libtorch asks for it. Memory of the device is memory of the host; kernels are logged.
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "launch.h"

namespace {

using Work = std::function<void()>;

// What a stream has recorded.
struct Graph {
    std::vector<Work> work;
};

struct Capture {
    unsigned long long id;
    Graph* graph;
    // It holds something that CUDA does not record.
    bool broken;
};

std::recursive_mutex mutex;
std::map<void*, Capture> captures;
unsigned long long captures_begun = 0;
std::map<const void*, std::string> kernels;
// Bytes by place, and all of them.
std::map<void*, size_t> allocations;
size_t allocated = 0;
constexpr size_t MEMORY = (size_t)80 << 30;
thread_local cudaError_t last_error = cudaSuccess;
thread_local int capture_mode = cudaStreamCaptureModeGlobal;

using Lock = std::lock_guard<std::recursive_mutex>;

__attribute__((format(printf, 1, 2))) void log(const char* format, ...) {
    static FILE* const file = std::fopen(getenv("LAUNCH_LOG") ? getenv("LAUNCH_LOG") : "/dev/null", "a");
    static const bool quiet = !getenv("LAUNCH_LOG") || !strcmp(getenv("LAUNCH_LOG"), "/dev/null");
    if (quiet || !file) return;
    va_list values;
    va_start(values, format);
    vfprintf(file, format, values);
    va_end(values);
    fputc('\n', file);
    fflush(file);
}

cudaError_t refused(const char* what) {
    log("REFUSED while a stream records: %s", what);
    return last_error = cudaErrorStreamCaptureUnsupported;
}

Capture* capture_of(void* stream) {
    const auto found = captures.find(stream);
    return found == captures.end() ? nullptr : &found->second;
}

// What takes or gives memory is refused to a thread that records and has not said otherwise.
bool forbidden() { return !captures.empty() && capture_mode != cudaStreamCaptureModeRelaxed; }

}  // namespace

EXPORT void launches_launch(const char* name, void* stream, const Work* work) {
    const Lock lock(mutex);
    if (Capture* capture = capture_of(stream)) {
        log("record %.80s", name);
        capture->graph->work.push_back(work ? *work : Work([] {}));
        return;
    }
    log("launch %.80s on %p%s", name, stream, captures.empty() ? "" : " BESIDE a stream that records");
    if (work) (*work)();
}

// Kernels, as compiled programs register and launch them.

EXPORT void** __cudaRegisterFatBinary(void*) { return new void*; }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    const Lock lock(mutex);
    kernels[host] = name;
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    void* stream;
};
static thread_local std::vector<Configuration> configurations;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    return configurations.push_back({grid, block, shared, stream}), 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    const Configuration last = configurations.back();
    configurations.pop_back();
    *grid = last.grid, *block = last.block, *shared = last.shared, *(void**)stream = last.stream;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    return *kernel = (cudaKernel_t)host, cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launches_launch(kernels[(const void*)kernel].c_str(), stream, nullptr), cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel, void**) {
    return launches_launch(kernels[kernel].c_str(), how->stream, nullptr), cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    return *blocks = 2, cudaSuccess;
}

// The device.

EXPORT const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "an error";
}
EXPORT const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
EXPORT cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    return last_error = cudaSuccess, error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    const Lock lock(mutex);
    return *total = MEMORY, *free = MEMORY - allocated, cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
    *device = {};
    strcpy(device->name, "none");
    device->major = 9, device->multiProcessorCount = 132, device->totalGlobalMem = MEMORY;
    device->warpSize = 32, device->maxThreadsPerBlock = 1024, device->maxThreadsPerMultiProcessor = 2048;
    device->sharedMemPerBlock = 49152, device->sharedMemPerBlockOptin = 232448, device->sharedMemPerMultiprocessor = 233472;
    device->maxGridSize[0] = 2147483647, device->maxGridSize[1] = device->maxGridSize[2] = 65535;
    device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024, device->maxThreadsDim[2] = 64;
    device->regsPerBlock = device->regsPerMultiprocessor = 65536, device->l2CacheSize = 50 << 20;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    default: *value = 0;
    }
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// Memory.

EXPORT cudaError_t cudaMalloc(void** place, size_t bytes) {
    const Lock lock(mutex);
    if (forbidden()) return refused("cudaMalloc");
    log("allocate %zu", bytes);
    if (bytes > MEMORY - allocated) return last_error = cudaErrorMemoryAllocation;
    // Zeros, which take no memory until they are written: a model may be larger than that of the host.
    *place = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*place == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
    allocated += allocations[*place] = bytes;
    return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* place) {
    const Lock lock(mutex);
    if (forbidden()) return refused("cudaFree");
    munmap(place, allocations[place]);
    allocated -= allocations[place];
    return allocations.erase(place), cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** place, size_t bytes, unsigned) {
    return *place = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* place) { return free(place), cudaSuccess; }
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
    *attributes = {};
    return attributes->type = cudaMemoryTypeUnregistered, cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    const Lock lock(mutex);
    const Work work = [=] { memcpy(to, from, bytes); };
    if (kind == cudaMemcpyDeviceToDevice) return launches_launch("copy within the device", stream, &work), cudaSuccess;
    if (Capture* capture = capture_of(stream)) {
        capture->broken = true;
        return refused("a copy between host and device");
    }
    log("copy %zu %s", bytes, kind == cudaMemcpyHostToDevice ? "to the device" : "to the host");
    return work(), cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    const Work work = [=] { memset(to, value, bytes); };
    return launches_launch("memset", stream, &work), cudaSuccess;
}

// Streams, events and graphs.

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
    return *stream = (cudaStream_t)aligned_alloc(64, 64), cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const Lock lock(mutex);
    if (Capture* capture = capture_of(stream)) {
        capture->broken = true;
        return refused("a wait for the stream");
    }
    return log("wait"), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
    const Lock lock(mutex);
    return captures.empty() ? cudaSuccess : refused("a wait for the device");
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = (cudaEvent_t)malloc(8), cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    const auto before = (cudaStreamCaptureMode)capture_mode;
    return capture_mode = *mode, *mode = before, cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    const Lock lock(mutex);
    *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* dependencies) {
    const Lock lock(mutex);
    cudaStreamIsCapturing(stream, status);
    if (dependencies) *dependencies = 0;
    if (const Capture* capture = capture_of(stream)) {
        if (id) *id = capture->id;
        if (graph) *graph = (cudaGraph_t)capture->graph;
    }
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    const Lock lock(mutex);
    if (!stream) return refused("the default stream");
    captures[stream] = {++captures_begun, new Graph, false};
    capture_mode = mode;
    return log("begin of recording %llu on %p", captures_begun, (void*)stream), cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const Lock lock(mutex);
    const Capture capture = captures.at(stream);
    captures.erase(stream);
    capture_mode = cudaStreamCaptureModeGlobal;
    log("end of recording %llu: %zu launches%s", capture.id, capture.graph->work.size(), capture.broken ? ", BROKEN" : "");
    *graph = capture.broken ? nullptr : (cudaGraph_t)capture.graph;
    return last_error = capture.broken ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* nodes) {
    return *nodes = ((Graph*)graph)->work.size(), cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    return *made = (cudaGraphExec_t) new Graph(*(const Graph*)graph), cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (Graph*)graph, cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete (Graph*)graph, cudaSuccess; }
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    const auto& work = ((const Graph*)graph)->work;
    log("launch a graph of %zu on %p", work.size(), (void*)stream);
    for (const Work& one : work) one();
    return cudaSuccess;
}
