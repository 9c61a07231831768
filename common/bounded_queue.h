// A queue of at most N elements in place: no allocation after construction. Not thread-safe.
#ifndef HEADROOM_COMMON_BOUNDED_QUEUE_H_
#define HEADROOM_COMMON_BOUNDED_QUEUE_H_

#include <array>
#include <cstddef>
#include <utility>

namespace headroom {

template <typename T, size_t N>
class BoundedQueue {
 public:
  bool empty() const { return size_ == 0; }
  bool full() const { return size_ == N; }
  size_t size() const { return size_; }

  // REQUIRES: !full().
  void push_back(T value) {
    items_[(head_ + size_) % N] = std::move(value);
    ++size_;
  }
  // REQUIRES: !empty().
  T& front() { return items_[head_]; }
  const T& front() const { return items_[head_]; }
  T pop_front() {
    T value = std::move(items_[head_]);
    head_ = (head_ + 1) % N;
    --size_;
    return value;
  }
  // The i-th from the front. REQUIRES: i < size().
  const T& operator[](size_t i) const { return items_[(head_ + i) % N]; }

 private:
  std::array<T, N> items_ = {};
  size_t head_ = 0;
  size_t size_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_BOUNDED_QUEUE_H_
