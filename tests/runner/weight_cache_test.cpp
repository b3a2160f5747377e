#include "runner/weight_cache.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utime.h>

#include <filesystem>
#include <fstream>

#include "runner/packed_file.h"

namespace mvlm {
namespace {

namespace fs = std::filesystem;

constexpr char kMethod[] = "text_decoder";
const PackedKey kKey = {"sha256:1", 1000, kMethod, "1.5.1", "build", "cpu"};

template <typename T>
void Append(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// What the backend writes for one name and `bytes` bytes of weights.
std::string BackendFile(uint64_t bytes, uint64_t entry_bytes) {
  std::string content;
  for (uint64_t i = 0; i < bytes; ++i) {
    content += static_cast<char>(i * 7 + i / 4096);
  }
  Append(content, uint32_t{4});
  content += "name";
  Append(content, uint64_t{0});
  Append(content, entry_bytes);
  Append(content, uint32_t{99});
  Append(content, bytes);
  Append(content, uint32_t{1});
  Append(content, uint32_t{0x58505743});
  Append(content, uint32_t{2});
  return content;
}

class WeightCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "mvlm_cache_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = fs::path(name) / "a" / "b";
  }
  void TearDown() override { fs::remove_all(folder_.parent_path().parent_path()); }

  WeightCache Cache(const PackedKey& key = kKey) {
    Result<WeightCache> cache = WeightCache::Create(folder_.string(), key);
    EXPECT_TRUE(cache.ok());
    return std::move(*cache);
  }

  // Stores a good file and gives its path.
  std::string Fill(const PackedKey& key = kKey, uint64_t bytes = 100 * 4096) {
    const FileDescriptor file = std::move(*MakeMemoryFile());
    const std::string content = BackendFile(bytes, bytes);
    EXPECT_EQ(write(file.get(), content.data(), content.size()),
              static_cast<ssize_t>(content.size()));
    const WeightCache cache = Cache(key);
    const Status status = cache.Store(kMethod, file.get());
    EXPECT_TRUE(status.ok()) << status.error().message;
    return cache.Path(kMethod);
  }

  std::string Complaint(const PackedKey& key = kKey) {
    const Result<FileDescriptor> file = Cache(key).Open(kMethod);
    return file.ok() ? "" : file.error().message;
  }

  size_t CountFiles() const {
    return static_cast<size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }

  fs::path folder_;
};

std::string ReadAll(const std::string& path) { return *ReadFile(path, uint64_t{1} << 30); }

void WriteAll(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
}

TEST(UserCacheFolder, FollowsTheXdgRules) {
  EXPECT_EQ(UserCacheFolder("/x", "/home/me"), "/x/mvlm");
  EXPECT_EQ(UserCacheFolder(nullptr, "/home/me"), "/home/me/.cache/mvlm");
  EXPECT_EQ(UserCacheFolder("", "/home/me"), "/home/me/.cache/mvlm");
  EXPECT_EQ(UserCacheFolder("relative", "/home/me"), "/home/me/.cache/mvlm");
  EXPECT_EQ(UserCacheFolder(nullptr, nullptr), std::nullopt);
  EXPECT_EQ(UserCacheFolder(nullptr, ""), std::nullopt);
}

TEST(PackedKey, EveryFieldCounts) {
  EXPECT_EQ(FirstDifference(kKey, kKey), "");
  std::vector<PackedKey> others(6, kKey);
  others[0].program_id = "sha256:2";
  others[1].model_bytes = 1001;
  others[2].method = "vision_encoder";
  others[3].executorch = "1.5.2";
  others[4].library = "other";
  others[5].cpu = "other";
  for (const PackedKey& other : others) {
    EXPECT_NE(FirstDifference(kKey, other), "");
    EXPECT_NE(ShortName(kKey), ShortName(other));
  }
  EXPECT_EQ(ShortName(kKey), ShortName(PackedKey(kKey)));
}

TEST(SampledPages, FirstAndLastAreAmongThem) {
  EXPECT_EQ(SampledPages(0, 4), (std::vector<uint64_t>{}));
  EXPECT_EQ(SampledPages(1, 4), (std::vector<uint64_t>{0}));
  EXPECT_EQ(SampledPages(3 * 4096, 4), (std::vector<uint64_t>{0, 4096, 8192}));
  EXPECT_EQ(SampledPages(100 * 4096, 3), (std::vector<uint64_t>{0, 49 * 4096, 99 * 4096}));
}

TEST_F(WeightCacheTest, KeepsWhatTheBackendWroteWhereItLooks) {
  const std::string path = Fill();
  const std::string backend = BackendFile(100 * 4096, 100 * 4096);
  const std::string kept = ReadAll(path);
  EXPECT_EQ(kept.substr(0, backend.size() - 20), backend.substr(0, backend.size() - 20));
  EXPECT_EQ(kept.substr(kept.size() - 20), backend.substr(backend.size() - 20));
  EXPECT_EQ(Complaint(), "");
  EXPECT_EQ(CountFiles(), 1u);
  EXPECT_EQ(fs::status(folder_).permissions(), fs::perms::owner_all);
}

TEST_F(WeightCacheTest, NothingIsThereAtFirst) {
  EXPECT_FALSE(Cache().Exists(kMethod));
  EXPECT_NE(Complaint().find("No such file"), std::string::npos);
  EXPECT_TRUE(Cache().CheckWritable().ok());
}

TEST_F(WeightCacheTest, AnOpenFileCannotBeLockedForWriting) {
  const std::string path = Fill();
  const Result<FileDescriptor> reader = Cache().Open(kMethod);
  const Result<FileDescriptor> second_reader = Cache().Open(kMethod);
  ASSERT_TRUE(reader.ok() && second_reader.ok());
  const FileDescriptor writer(open(path.c_str(), O_RDWR));
  EXPECT_NE(flock(writer.get(), LOCK_EX | LOCK_NB), 0);
}

TEST_F(WeightCacheTest, EveryLengthButTheRightOneIsFound) {
  const std::string path = Fill();
  const std::string whole = ReadAll(path);
  for (const size_t length : {size_t{0}, size_t{1}, size_t{19}, size_t{40}, whole.size() / 2,
                              size_t{100 * 4096}, whole.size() - 20, whole.size() - 1}) {
    WriteAll(path, whole.substr(0, length));
    EXPECT_NE(Complaint(), "") << length;
  }
  WriteAll(path, whole + "x");
  EXPECT_NE(Complaint(), "");
  // Of the right end, but without a page.
  WriteAll(path, whole.substr(4096));
  EXPECT_NE(Complaint().find("damaged"), std::string::npos) << Complaint();
  WriteAll(path, whole);
  EXPECT_EQ(Complaint(), "");
}

TEST_F(WeightCacheTest, ChangesAtTheEndAndInSampledPagesAreFound) {
  const std::string path = Fill();
  const std::string whole = ReadAll(path);
  std::vector<size_t> places = {0, 4095, 99 * 4096};
  for (size_t at = 100 * 4096; at < whole.size(); ++at) {
    places.push_back(at);
  }
  for (const size_t at : places) {
    std::string changed = whole;
    changed[at] = static_cast<char>(changed[at] ^ 0x15);
    WriteAll(path, changed);
    EXPECT_NE(Complaint(), "") << at;
  }
}

TEST_F(WeightCacheTest, ForeignFilesAreFound) {
  const std::string path = Fill();
  for (const std::string& content : {std::string("hello"), std::string(100000, '\0'),
                                     std::string(100000, 'x'), BackendFile(8192, 8192)}) {
    WriteAll(path, content);
    EXPECT_NE(Complaint(), "");
  }
  fs::remove(path);
  fs::create_directory(path);
  EXPECT_NE(Complaint(), "");
  fs::remove(path);
  fs::create_symlink("/etc/passwd", path);
  EXPECT_NE(Complaint(), "");
}

TEST_F(WeightCacheTest, AFileOfAnotherKeyUnderThisNameIsStale) {
  PackedKey other = kKey;
  other.cpu = "elsewhere";
  fs::rename(Fill(other), Cache().Path(kMethod));
  EXPECT_NE(Complaint().find("is stale (of another processor)"), std::string::npos) << Complaint();
}

TEST_F(WeightCacheTest, AnIndexThatPointsOutsideIsNotKept) {
  const FileDescriptor file = std::move(*MakeMemoryFile());
  const std::string content = BackendFile(4096, 4097);
  ASSERT_EQ(write(file.get(), content.data(), content.size()),
            static_cast<ssize_t>(content.size()));
  ASSERT_TRUE(Cache().Store(kMethod, file.get()).ok());
  EXPECT_NE(Complaint().find("index"), std::string::npos) << Complaint();
}

TEST_F(WeightCacheTest, AnUnfinishedBackendFileIsNotStored) {
  const FileDescriptor file = std::move(*MakeMemoryFile());
  const Status empty = Cache().Store(kMethod, file.get());
  EXPECT_FALSE(empty.ok());
  const std::string content(8192, 'x');
  ASSERT_EQ(write(file.get(), content.data(), content.size()), 8192);
  const Status unfinished = Cache().Store(kMethod, file.get());
  ASSERT_FALSE(unfinished.ok());
  EXPECT_NE(unfinished.error().message.find("unfinished"), std::string::npos);
  EXPECT_EQ(CountFiles(), 0u);
}

TEST_F(WeightCacheTest, StoringRemovesWhatIsOfNoUseAnyMore) {
  PackedKey older_library = kKey;
  older_library.library = "older";
  PackedKey other_cpu = kKey;
  other_cpu.cpu = "other";
  PackedKey other_program = kKey;
  other_program.program_id = "sha256:2";
  const std::string stale = Fill(older_library);
  const std::string kept = Fill(other_cpu);
  const std::string kept_too = Fill(other_program);
  const std::string abandoned = Cache().Path(kMethod) + ".AbCdEf";
  const std::string in_progress = Cache().Path(kMethod) + ".GhIjKl";
  WriteAll(abandoned, "x");
  WriteAll(in_progress, "x");
  const utimbuf long_ago = {1, 1};
  ASSERT_EQ(utime(abandoned.c_str(), &long_ago), 0);
  const std::string path = Fill();
  EXPECT_FALSE(fs::exists(stale));
  EXPECT_FALSE(fs::exists(abandoned));
  for (const std::string& file : {path, kept, kept_too, in_progress}) {
    EXPECT_TRUE(fs::exists(file)) << file;
  }
}

TEST_F(WeightCacheTest, AFileIsNoFolder) {
  fs::create_directories(folder_.parent_path());
  WriteAll(folder_.string(), "x");
  const Result<WeightCache> cache = WeightCache::Create(folder_.string(), kKey);
  ASSERT_FALSE(cache.ok());
  EXPECT_EQ(cache.error().kind, ErrorKind::kInvalidInput);
  const Result<WeightCache> below = WeightCache::Create((folder_ / "c").string(), kKey);
  ASSERT_FALSE(below.ok());
  EXPECT_EQ(below.error().kind, ErrorKind::kFailure);
}

}  // namespace
}  // namespace mvlm
