#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace latentrt {
namespace {

// Who waits looks again and again for this long, as between two operators of a network, before it sleeps: waking it
// then costs 50 us and more on a virtual machine. While looking it gives its CPU to any other thread that wants it.
constexpr std::chrono::microseconds kPatience{1000};

class Worker {
public:
    Worker() : thread_([this] { loop(); }), handle_(thread_.native_handle()) { thread_.detach(); }

    void start(Task task, void* argument, int index) {
        task_ = task;
        argument_ = argument;
        index_ = index;
        leave(sched_getcpu());
        busy_.store(true, std::memory_order_release);
        busy_.notify_one();
    }

    void wait() const { wait_until(false); }

private:
    // Keeps this worker off the caller's CPU. Where a sleeping virtual CPU does not count as idle, the system would wake
    // the worker there, and the two would take turns for as long as they live.
    void leave(int cpu) {
        if (cpu == left_) return;
        left_ = cpu;
        cpu_set_t cpus;
        if (sched_getaffinity(0, sizeof cpus, &cpus)) return; // more CPUs than the set holds
        CPU_CLR(cpu, &cpus);
        if (CPU_COUNT(&cpus)) pthread_setaffinity_np(handle_, sizeof cpus, &cpus);
    }

    void wait_until(bool value) const {
        const auto end = std::chrono::steady_clock::now() + kPatience;
        do {
            for (int i = 0; i < 64; i++) {
                if (busy_.load(std::memory_order_acquire) == value) return;
                __builtin_ia32_pause();
            }
            sched_yield();
        } while (std::chrono::steady_clock::now() < end);
        busy_.wait(!value, std::memory_order_acquire);
    }

    void loop() {
        for (;;) {
            wait_until(true);
            task_(argument_, index_);
            busy_.store(false, std::memory_order_release);
            busy_.notify_one();
        }
    }

    std::atomic<bool> busy_{false};
    Task task_ = nullptr;
    void* argument_ = nullptr;
    int index_ = 0;
    int left_ = -1;
    std::thread thread_;
    pthread_t handle_;
};

struct Team {
    std::mutex in_use;
    std::vector<std::unique_ptr<Worker>> workers;
};

// Never destroyed: its workers run until the process ends. A forked child has none of them and starts its own.
Team* team = nullptr;

Team& the_team() {
    static std::once_flag once;
    std::call_once(once, [] {
        team = new Team;
        pthread_atfork(nullptr, nullptr, [] { team = new Team; });
    });
    return *team;
}

// The most workers, from 0 to `count`, that the system lets this process have.
int hire(Team& team, int count) {
    try {
        while (static_cast<int>(team.workers.size()) < count) team.workers.push_back(std::make_unique<Worker>());
    } catch (const std::exception&) {
        count = static_cast<int>(team.workers.size());
    }
    return count;
}

} // namespace

void run_on_team(int count, Task task, void* argument) {
    int helpers = 0;
    std::unique_lock<std::mutex> lock;
    if (count > 1) {
        Team& team = the_team();
        lock = std::unique_lock(team.in_use, std::try_to_lock);
        if (lock) helpers = hire(team, count - 1);
        for (int i = 0; i < helpers; i++) team.workers[i]->start(task, argument, i + 1);
    }
    task(argument, 0);
    for (int i = helpers + 1; i < count; i++) task(argument, i);
    for (int i = 0; i < helpers; i++) the_team().workers[i]->wait();
}

} // namespace latentrt
