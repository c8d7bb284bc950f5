// What is called from outside: steps, and adapters brought into the form that they need.

#include "packing.h"
#include "run.h"

namespace loralab {

// One step at a time in a process: steps share the team and the workspace.
std::mutex& turn() {
  static std::mutex mutex;
  return mutex;
}

template <class W, class T>
void run(const Model* model, const Step* step, int threads) {
  static Workspace space;
  std::lock_guard<std::mutex> lock(turn());
  Team& team = team_of(threads);
  Run<W, T> job(*model, *step, team, space);
  team.run([&](int thread) { job(thread); });
}

// On the caller's thread alone, so that it may go on beside a step.
template <class T>
void pack_all(const Packing* jobs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pack<T>(jobs[i]);
}

}  // namespace loralab

extern "C" {
void loralab_run_fp32(const loralab::Model* m, const loralab::Step* s, int n) {
  loralab::run<float, float>(m, s, n);
}
void loralab_run_bf16(const loralab::Model* m, const loralab::Step* s, int n) {
  loralab::run<loralab::bf16, loralab::bf16>(m, s, n);
}
void loralab_run_int8_fp32(const loralab::Model* m, const loralab::Step* s, int n) {
  loralab::run<int8_t, float>(m, s, n);
}
void loralab_run_int8_bf16(const loralab::Model* m, const loralab::Step* s, int n) {
  loralab::run<int8_t, loralab::bf16>(m, s, n);
}
void loralab_pack_fp32(const loralab::Packing* jobs, int64_t count) {
  loralab::pack_all<float>(jobs, count);
}
void loralab_pack_bf16(const loralab::Packing* jobs, int64_t count) {
  loralab::pack_all<loralab::bf16>(jobs, count);
}
// The sizes of the structures, so that the caller can see that it means the same ones.
int64_t loralab_sizes() {
  return sizeof(loralab::Model) + 1000 * sizeof(loralab::Block) + 1000000 * sizeof(loralab::Step) +
         1000000000ll * sizeof(loralab::Group);
}
}
