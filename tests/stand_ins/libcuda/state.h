// What the driver of driver.cpp holds: memory, handles, and what is asked of it.

#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

extern "C" long long stack_size();
extern "C" long long moves_size();
extern "C" long long taps_size();
extern "C" long long threads_per_block();

namespace {

typedef unsigned long long Address;
typedef std::vector<std::function<void()>> Graph;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
       INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };
const int DEVICES = 2;
const size_t ALIGNMENT = 256;
const int DEVICE_ATTRIBUTE_MAJOR = 75, DEVICE_ATTRIBUTE_MINOR = 76;  // of the compute capability
const unsigned NON_BLOCKING = 1;
const int CAPTURE_MODE_THREAD_LOCAL = 1;

struct Context { size_t used; };
struct Block { size_t bytes; Context* context; };  // context: null for pinned host memory
struct Stream { Context* context; Graph* captured; };
struct Event { Context* context; double ms; };
struct Module { Context* context; };
struct Function { Context* context; void (*run)(const void*, long long); size_t parameter_bytes; };
struct Executable { Context* context; Graph graph; };

std::recursive_mutex mutex;
bool initialized;
size_t capacity = size_t(1) << 31;
int instantiation = SUCCESS;
Context contexts[DEVICES];
std::map<Address, Block> memory;
thread_local Context* current;
thread_local Stream* capturing;

template <class T>
std::set<const void*>& handles() {
    static std::set<const void*> live;
    return live;
}
template <class T>
bool is(const T* handle) { return handles<T>().count(handle); }
template <class T>
bool is_here(const T* handle) { return is(handle) && handle->context == current; }
template <class T>
int made(T** where, T* handle) {
    handles<T>().insert(*where = handle);
    return SUCCESS;
}
template <class T>
int destroyed(T* handle) {
    if (!handles<T>().erase(handle)) return INVALID_HANDLE;
    delete handle;
    return SUCCESS;
}

// Whether bytes lie in one allocation of a context, or in pinned memory (null).
bool lies(Address address, size_t bytes, const Context* context) {
    auto after = memory.upper_bound(address);
    if (after == memory.begin()) return false;
    const auto& [start, block] = *--after;
    return block.context == context && address + bytes <= start + block.bytes;
}

int allocated(Address* where, size_t bytes, Context* context) {
    if (!bytes) return INVALID_VALUE;
    const size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void* found = aligned_alloc(ALIGNMENT, rounded);
    if (!found) return OUT_OF_MEMORY;
    memset(found, 0xff, rounded);  // a NaN in every float type
    memory[*where = (Address)found] = {bytes, context};
    return SUCCESS;
}

int freed(Address address, bool pinned) {
    const auto found = memory.find(address);
    if (found == memory.end() || pinned != !found->second.context) return INVALID_VALUE;
    if (found->second.context) found->second.context->used -= found->second.bytes;
    memory.erase(found);
    free((void*)address);
    return SUCCESS;
}

int put(Stream* stream, std::function<void()> work) {
    if (!is_here(stream)) return INVALID_HANDLE;
    if (stream->captured) stream->captured->push_back(work);
    else work();
    return SUCCESS;
}

int copied(Stream* stream, Address to, const Context* to_where, Address from, const Context* from_where, size_t bytes) {
    if (!lies(to, bytes, to_where) || !lies(from, bytes, from_where)) return INVALID_VALUE;
    return put(stream, [=] { memcpy((void*)to, (const void*)from, bytes); });
}

std::map<std::pair<std::string, int>, void*>& functions() {
    static std::map<std::pair<std::string, int>, void*> known;
    return known;
}
struct Entry {
    Entry(const char* name, int version, void* function) { functions()[{name, version}] = function; }
};

// The first time that a function is called.
void note(const char* name) {
    static std::set<std::string> called;
    const char* path = getenv("STUB_CALLS");
    if (path && called.insert(name).second) std::ofstream(path, std::ios::app) << name << "\n";
}

double now_ms() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void* self() {
    Dl_info where;
    dladdr((void*)&stack_size, &where);
    return dlopen(where.dli_fname, RTLD_NOW);
}

}  // namespace
