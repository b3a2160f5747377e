#include "runner/pte_file.h"

#include <gtest/gtest.h>

namespace mvlm {
namespace {

std::string LittleEndian(uint64_t value, size_t bytes) {
  std::string text;
  for (size_t i = 0; i < bytes; ++i) {
    text += static_cast<char>(value >> (8 * i));
  }
  return text;
}

std::string Head(uint64_t program, uint64_t offset, uint64_t weights, uint64_t header_bytes = 32) {
  std::string head = LittleEndian(48, 4) + "ET12" + "eh00" + LittleEndian(header_bytes, 4) +
                     LittleEndian(program, 8) + LittleEndian(offset, 8) + LittleEndian(weights, 8);
  head.resize(kPteHeadBytes);
  return head;
}

std::string Complaint(const std::string& head, uint64_t file_size) {
  const Status status = CheckPteHeader(head, file_size);
  return status.ok() ? "" : status.error().message;
}

TEST(CheckPteHeader, AcceptsAWholeFile) {
  EXPECT_EQ(Complaint(Head(1000, 1024, 500), 1524), "");
  EXPECT_EQ(Complaint(Head(1000, 1024, 500), 9999), "");
  EXPECT_EQ(Complaint(Head(1000, 0, 0), 1000), "");
  // A header from before the size of the weights was in it.
  EXPECT_EQ(Complaint(Head(1000, 1024, 0xFFFF, 24), 1024), "");
}

TEST(CheckPteHeader, RefusesACutOffFile) {
  for (const uint64_t size : {100, 999, 1024, 1523}) {
    EXPECT_NE(Complaint(Head(1000, 1024, 500), size).find("cut off"), std::string::npos) << size;
  }
}

TEST(CheckPteHeader, AbsurdSizesDoNotOverflow) {
  EXPECT_NE(Complaint(Head(UINT64_MAX, 0, 0), 2000), "");
  EXPECT_NE(Complaint(Head(1000, UINT64_MAX, 2000), 2000), "");
  EXPECT_NE(Complaint(Head(1000, 1500, UINT64_MAX), 2000), "");
}

TEST(CheckPteHeader, RefusesWhatIsNoProgram) {
  EXPECT_NE(Complaint("", 0).find("empty"), std::string::npos);
  EXPECT_NE(Complaint("short", 5).find("not an ExecuTorch program"), std::string::npos);
  EXPECT_NE(Complaint(std::string(kPteHeadBytes, 'x'), 4096).find("not an ExecuTorch program"),
            std::string::npos);
  std::string no_header = Head(1000, 1024, 500);
  no_header.replace(8, 4, "????");
  EXPECT_NE(Complaint(no_header, 2000).find("extended header"), std::string::npos);
  EXPECT_NE(Complaint(Head(1000, 1024, 500, 8), 2000).find("damaged"), std::string::npos);
}

TEST(CheckPteFile, NamesAFileThatCannotBeRead) {
  const auto missing = CheckPteFile("/nonexistent/a.pte");
  ASSERT_FALSE(missing.ok());
  EXPECT_NE(missing.error().message.find("/nonexistent/a.pte: No such file"), std::string::npos);
  EXPECT_FALSE(CheckPteFile("/").ok());
  EXPECT_FALSE(CheckPteFile("/dev/zero").ok());
}

}  // namespace
}  // namespace mvlm
