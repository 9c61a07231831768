// Certificates that a test makes for itself: P-256, valid for a day.
#ifndef HEADROOM_TESTS_COMMON_TEST_CERTIFICATES_H_
#define HEADROOM_TESTS_COMMON_TEST_CERTIFICATES_H_

#include <memory>
#include <string>

namespace headroom {

struct TestCertificate {
  std::string certificate;  // PEM
  std::string key;          // PEM
};

class TestCa {
 public:
  explicit TestCa(const std::string& name);
  ~TestCa();

  const std::string& certificate() const { return pem_; }
  // For the DNS name `name`; `expired`: since an hour.
  TestCertificate Issue(const std::string& name, bool expired = false) const;

 private:
  struct Impl;
  const std::unique_ptr<Impl> impl_;
  std::string pem_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_TEST_CERTIFICATES_H_
