#include "runner/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace mvlm {
namespace {

namespace fs = std::filesystem;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "mvlm_file_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string Path(const std::string& name) const { return (folder_ / name).string(); }

  size_t CountFiles() const {
    return static_cast<size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  fs::path folder_;
};

TEST_F(FileTest, ReadsWhatWasCommitted) {
  const std::string content("a\0b\n", 4);
  Result<PendingFile> file = PendingFile::Create(Path("x"));
  ASSERT_TRUE(file.ok());
  EXPECT_FALSE(fs::exists(Path("x")));
  ASSERT_TRUE(file->Commit(content).ok());
  EXPECT_EQ(*ReadFile(Path("x"), 4), content);
  EXPECT_EQ(CountFiles(), 1u);
}

TEST_F(FileTest, LeavesNothingBehindWithoutCommit) {
  std::ofstream(Path("x")) << "old";
  { ASSERT_TRUE(PendingFile::Create(Path("x")).ok()); }
  EXPECT_EQ(*ReadFile(Path("x"), 99), "old");
  EXPECT_EQ(CountFiles(), 1u);
}

TEST_F(FileTest, ReplacesAnOlderFileAndHasUsualPermissions) {
  std::ofstream(Path("x")) << "old and longer";
  Result<PendingFile> file = PendingFile::Create(Path("x"));
  ASSERT_TRUE(file->Commit("new").ok());
  EXPECT_EQ(*ReadFile(Path("x"), 99), "new");
  const mode_t mask = umask(0);
  umask(mask);
  struct stat info = {};
  ASSERT_EQ(stat(Path("x").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0666u & ~mask);
}

TEST_F(FileTest, GrowsPieceByPieceIntoReservedSpace) {
  Result<PendingFile> file = PendingFile::Create(Path("x"));
  ASSERT_TRUE(file->Reserve(6).ok());
  ASSERT_TRUE(file->Append("ab").ok());
  ASSERT_TRUE(file->Append("cd").ok());
  EXPECT_FALSE(fs::exists(Path("x")));
  ASSERT_TRUE(file->Commit("ef", /*durable=*/true).ok());
  EXPECT_EQ(*ReadFile(Path("x"), 99), "abcdef");
}

TEST_F(FileTest, AFullDiskIsKnownBeforehand) {
  Result<PendingFile> file = PendingFile::Create(Path("x"));
  const uint64_t more_than_there_is = fs::space(folder_).available + (uint64_t{1} << 40);
  EXPECT_FALSE(file->Reserve(more_than_there_is).ok());
}

TEST_F(FileTest, ReadsAPartOrFails) {
  std::ofstream(Path("x")) << "0123456789";
  const FileDescriptor file(open(Path("x").c_str(), O_RDONLY));
  EXPECT_EQ(*ReadAt(file.get(), 3, 4), "3456");
  EXPECT_EQ(*ReadAt(file.get(), 10, 0), "");
  EXPECT_FALSE(ReadAt(file.get(), 7, 4).ok());
}

TEST_F(FileTest, WritesToADeviceInPlace) {
  Result<PendingFile> file = PendingFile::Create("/dev/null");
  ASSERT_TRUE(file.ok());
  EXPECT_TRUE(file->Commit("gone").ok());
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
}

TEST_F(FileTest, RefusesWhatCannotBeWritten) {
  EXPECT_FALSE(PendingFile::Create(Path("no/such/folder")).ok());
  EXPECT_FALSE(PendingFile::Create(folder_.string()).ok());
  EXPECT_FALSE(PendingFile::Create("").ok());
}

TEST_F(FileTest, RefusesWhatCannotBeRead) {
  const auto complaint = [](const Result<std::string>& result) {
    return result.ok() ? "" : result.error().message;
  };
  EXPECT_NE(complaint(ReadFile(Path("none"), 9)).find("No such file"), std::string::npos);
  EXPECT_NE(complaint(ReadFile(folder_.string(), 9)).find("a folder"), std::string::npos);
  EXPECT_NE(complaint(ReadFile("/dev/zero", 9)).find("not a file"), std::string::npos);
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  EXPECT_NE(complaint(ReadFile(Path("pipe"), 9)).find("not a file"), std::string::npos);
  std::ofstream(Path("long")) << "0123456789";
  EXPECT_NE(complaint(ReadFile(Path("long"), 9)).find("10 bytes"), std::string::npos);
}

}  // namespace
}  // namespace mvlm
