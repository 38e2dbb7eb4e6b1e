#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace latentrt {
namespace {

// A worker looks for its next task this often before it sleeps: some 0.2 ms, as between two operators of a network.
// Waking one that sleeps costs 50 us and more, on a virtual machine.
constexpr int kSpins = 5000;

class Worker {
public:
    Worker() : thread_([this] { loop(); }) { thread_.detach(); }

    void start(Task task, void* argument, int index) {
        task_ = task;
        argument_ = argument;
        index_ = index;
        busy_.store(true, std::memory_order_release);
        busy_.notify_one();
    }

    void wait() const { wait_until(false); }

private:
    void wait_until(bool value) const {
        for (int i = 0; i < kSpins; i++) {
            if (busy_.load(std::memory_order_acquire) == value) return;
            __builtin_ia32_pause();
        }
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
    std::thread thread_;
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
