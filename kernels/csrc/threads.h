// A team of threads that sleeps between calls.
#pragma once

namespace latentrt {

using Task = void (*)(void* argument, int index);

// Runs task(argument, i) for i in [0, count), the caller taking i = 0, and returns when all are done. Where another
// caller has the team, this one does all its tasks itself.
void run_on_team(int count, Task task, void* argument);

// The most threads that a call may ask for.
constexpr int kMaxThreads = 512;

} // namespace latentrt
