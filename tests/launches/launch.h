// What the libraries that stand in for CUDA share: libcudart has it, the others look for it.
#pragma once
#include <dlfcn.h>

#include <functional>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Runs the work of a launch on a stream, or keeps it where the stream records. Without work nothing is computed.
using Launch = void (*)(const char* name, void* stream, const std::function<void()>* work);

inline void launch(const char* name, void* stream, const std::function<void()>* work = nullptr) {
    static const auto function = (Launch)dlsym(RTLD_DEFAULT, "launches_launch");
    function(name, stream, work);
}
