// A CUDA driver of host memory, libcuda.so.1, for the real cuda-bindings to load: they call it with the types, in the order
// and with the handles that they would give to NVIDIA's driver, and what does not fit is refused.
//
// Two devices, each with memory of its own. Work is done when it is put on a stream; a captured stream records instead, and
// a graph repeats. Kernels are ours, compiled for the host (host.cpp). Documentation: NVIDIA, "CUDA Driver API".

#include "state.h"

// A function of the driver, found by its name and the first CUDA (3020 is 3.2) that had this form of it.
#define CALL(name, version, ...)                            \
    int name(__VA_ARGS__);                                  \
    const Entry name##_entry(#name, version, (void*)&name); \
    int name(__VA_ARGS__)
#define ENTER                                                \
    const std::lock_guard<std::recursive_mutex> lock(mutex); \
    note(__func__);                                          \
    if (!initialized) return NOT_INITIALIZED
#define ENTER_CONTEXT ENTER; if (!current) return INVALID_CONTEXT
#define ENTER_UNCAPTURED ENTER_CONTEXT; if (capturing) return CAPTURE_UNSUPPORTED

extern "C" {

// What a test asks for and finds out; names of calls go to a file too (STUB_CALLS)

void stub_capacity(size_t bytes) { capacity = bytes; }
void stub_instantiation(int status) { instantiation = status; }
size_t stub_live_handles() {
    return memory.size() + handles<Stream>().size() + handles<Event>().size() + handles<Graph>().size() + handles<Executable>().size();
}

// Devices and contexts

CALL(cuInit, 2000, unsigned flags) {
    initialized = flags == 0;
    ENTER;
    return SUCCESS;
}
CALL(cuDriverGetVersion, 2020, int* version) {
    ENTER;
    const char* asked = getenv("STUB_CUDA_VERSION");
    *version = asked ? atoi(asked) : 13000;
    return SUCCESS;
}
CALL(cuDeviceGetCount, 2000, int* count) { ENTER; *count = DEVICES; return SUCCESS; }
CALL(cuDeviceGet, 2000, int* device, int index) {
    ENTER;
    *device = index;
    return 0 <= index && index < DEVICES ? SUCCESS : INVALID_DEVICE;
}
CALL(cuDeviceGetName, 2000, char* name, int length, int device) {
    ENTER;
    const std::string text = "stub " + std::to_string(device);
    if (length <= (int)text.size()) return INVALID_VALUE;
    strcpy(name, text.c_str());
    return 0 <= device && device < DEVICES ? SUCCESS : INVALID_DEVICE;
}
CALL(cuDeviceGetAttribute, 2000, int* value, int attribute, int device) {
    ENTER;
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    *value = attribute == DEVICE_ATTRIBUTE_MAJOR ? 9 : 0;
    return attribute == DEVICE_ATTRIBUTE_MAJOR || attribute == DEVICE_ATTRIBUTE_MINOR ? SUCCESS : INVALID_VALUE;
}
CALL(cuDevicePrimaryCtxRetain, 7000, Context** context, int device) {
    ENTER;
    if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
    *context = &contexts[device];
    return SUCCESS;
}
CALL(cuCtxSetCurrent, 4000, Context* context) {
    ENTER;
    if (context != &contexts[0] && context != &contexts[1]) return INVALID_CONTEXT;
    current = context;
    return SUCCESS;
}
CALL(cuCtxGetCurrent, 4000, Context** context) { ENTER; *context = current; return SUCCESS; }
CALL(cuCtxGetDevice, 2000, int* device) { ENTER_CONTEXT; *device = current - contexts; return SUCCESS; }
CALL(cuCtxSynchronize, 2000) { ENTER_UNCAPTURED; return SUCCESS; }
CALL(cuGetErrorString, 6000, int status, const char** text) {
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    note(__func__);
    const std::map<int, const char*> texts = {{SUCCESS, "no error"}, {INVALID_VALUE, "invalid argument"},
        {OUT_OF_MEMORY, "out of memory"}, {INVALID_HANDLE, "invalid resource handle"}, {INVALID_CONTEXT, "invalid device context"},
        {CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"}};
    const auto found = texts.find(status);
    *text = found == texts.end() ? nullptr : found->second;
    return *text ? SUCCESS : INVALID_VALUE;
}

// Memory

CALL(cuMemAlloc, 3020, Address* where, size_t bytes) {
    ENTER_UNCAPTURED;
    if (current->used + bytes > capacity) return OUT_OF_MEMORY;
    const int status = allocated(where, bytes, current);
    if (status == SUCCESS) current->used += bytes;
    return status;
}
CALL(cuMemFree, 3020, Address address) { ENTER_UNCAPTURED; return freed(address, false); }
CALL(cuMemHostAlloc, 2020, Address* where, size_t bytes, unsigned flags) {
    ENTER_UNCAPTURED;
    return flags ? INVALID_VALUE : allocated(where, bytes, nullptr);
}
CALL(cuMemFreeHost, 2000, Address address) { ENTER_UNCAPTURED; return freed(address, true); }
CALL(cuMemGetInfo, 3020, size_t* free_bytes, size_t* total_bytes) {
    ENTER_CONTEXT;
    *free_bytes = capacity - std::min(capacity, current->used);
    *total_bytes = capacity;
    return SUCCESS;
}
CALL(cuMemcpyHtoD, 3020, Address to, const void* from, size_t bytes) {
    ENTER_UNCAPTURED;
    if (!lies(to, bytes, current)) return INVALID_VALUE;
    memcpy((void*)to, from, bytes);
    return SUCCESS;
}
CALL(cuMemcpyDtoH, 3020, void* to, Address from, size_t bytes) {
    ENTER_UNCAPTURED;
    if (!lies(from, bytes, current)) return INVALID_VALUE;
    memcpy(to, (const void*)from, bytes);
    return SUCCESS;
}
CALL(cuMemcpyHtoDAsync, 3020, Address to, Address from, size_t bytes, Stream* stream) {
    ENTER_CONTEXT;
    return copied(stream, to, current, from, nullptr, bytes);
}
CALL(cuMemcpyDtoHAsync, 3020, Address to, Address from, size_t bytes, Stream* stream) {
    ENTER_CONTEXT;
    return copied(stream, to, nullptr, from, current, bytes);
}
CALL(cuMemcpyDtoDAsync, 3020, Address to, Address from, size_t bytes, Stream* stream) {
    ENTER_CONTEXT;
    return copied(stream, to, current, from, current, bytes);
}

// Streams and events

CALL(cuStreamCreate, 2000, Stream** stream, unsigned flags) {
    ENTER_UNCAPTURED;
    return flags == NON_BLOCKING ? made(stream, new Stream{current, nullptr}) : INVALID_VALUE;
}
CALL(cuStreamDestroy, 4000, Stream* stream) { ENTER_UNCAPTURED; return destroyed(stream); }
CALL(cuStreamSynchronize, 2000, Stream* stream) { ENTER_UNCAPTURED; return is_here(stream) ? SUCCESS : INVALID_HANDLE; }
CALL(cuEventCreate, 2000, Event** event, unsigned flags) {
    ENTER_UNCAPTURED;
    return flags ? INVALID_VALUE : made(event, new Event{current, -1});
}
CALL(cuEventDestroy, 4000, Event* event) { ENTER_UNCAPTURED; return destroyed(event); }
CALL(cuEventRecord, 2000, Event* event, Stream* stream) {
    ENTER_UNCAPTURED;
    if (!is_here(event)) return INVALID_HANDLE;
    return put(stream, [=] { event->ms = now_ms(); });
}
CALL(cuEventElapsedTime, 12080, float* ms, Event* first, Event* last) {
    ENTER_UNCAPTURED;
    if (!is_here(first) || !is_here(last) || first->ms < 0 || last->ms < 0) return INVALID_HANDLE;
    *ms = last->ms - first->ms;
    return SUCCESS;
}

// Graphs

CALL(cuStreamBeginCapture, 10010, Stream* stream, int mode) {
    ENTER_UNCAPTURED;
    if (!is_here(stream)) return INVALID_HANDLE;
    if (mode != CAPTURE_MODE_THREAD_LOCAL) return INVALID_VALUE;
    capturing = stream;
    stream->captured = new Graph;
    return SUCCESS;
}
CALL(cuStreamEndCapture, 10000, Stream* stream, Graph** graph) {
    ENTER_CONTEXT;
    if (!is_here(stream) || stream != capturing) return INVALID_HANDLE;
    capturing = nullptr;
    made(graph, stream->captured);
    stream->captured = nullptr;
    return SUCCESS;
}
CALL(cuGraphGetNodes, 10000, Graph* graph, void** nodes, size_t* count) {
    ENTER;
    if (!is(graph)) return INVALID_HANDLE;
    if (nodes) return INVALID_VALUE;  // we ask for their number alone
    *count = graph->size();
    return SUCCESS;
}
CALL(cuGraphInstantiateWithFlags, 11040, Executable** executable, Graph* graph, unsigned long long flags) {
    ENTER_CONTEXT;
    if (!is(graph)) return INVALID_HANDLE;
    if (flags) return INVALID_VALUE;
    return instantiation == SUCCESS ? made(executable, new Executable{current, *graph}) : instantiation;
}
CALL(cuGraphDestroy, 10000, Graph* graph) { ENTER; return destroyed(graph); }
CALL(cuGraphExecDestroy, 10000, Executable* executable) { ENTER; return destroyed(executable); }
CALL(cuGraphLaunch, 10000, Executable* executable, Stream* stream) {
    ENTER_UNCAPTURED;
    if (!is_here(executable)) return INVALID_HANDLE;
    return put(stream, [=] { for (const auto& work : executable->graph) work(); });
}

// Kernels

CALL(cuModuleLoadData, 2000, Module** module, const void* image) {
    ENTER_UNCAPTURED;
    return memcmp(image, "\x7f" "ELF", 4) ? INVALID_IMAGE : made(module, new Module{current});
}
CALL(cuModuleGetFunction, 2000, Function** function, Module* module, const char* name) {
    ENTER;
    static void* const kernels = self();
    if (!is_here(module)) return INVALID_HANDLE;
    const auto run = (void (*)(const void*, long long))dlsym(kernels, name);
    if (!run) return NOT_FOUND;
    const std::map<std::string, size_t> others = {{"goc_next_step", sizeof(void*)}, {"goc_step_moves", moves_size()}};
    const auto found = others.find(name);
    const size_t size = strncmp(name, "goc_accumulate_", 15) ? stack_size() : taps_size();
    return made(function, new Function{current, run, found == others.end() ? size : found->second});
}
CALL(cuLaunchKernel, 4000, Function* function, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared_bytes, Stream* stream, void** parameters, void** extra) {
    ENTER_CONTEXT;
    if (!is_here(function)) return INVALID_HANDLE;
    if (!blocks || threads != threads_per_block() || blocks_y * blocks_z * threads_y * threads_z != 1 || shared_bytes || extra)
        return INVALID_VALUE;
    const std::vector<char> values((const char*)parameters[0], (const char*)parameters[0] + function->parameter_bytes);
    return put(stream, [=] { function->run(values.data(), (long long)blocks * threads); });
}

// How the bindings, and NVRTC, find all this

int cuGetProcAddress_v2(const char* name, void** found, int version, unsigned long long, int*) {
    const auto entry = functions().find({name, version});
    *found = entry == functions().end() ? nullptr : entry->second;
    return *found ? SUCCESS : NOT_FOUND;
}
const Entry get_proc_address("cuGetProcAddress", 12000, (void*)&cuGetProcAddress_v2);
int cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return NOT_FOUND;
}
}
